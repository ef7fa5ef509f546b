"""Options in, exit code out: the commands and what people see of them."""
