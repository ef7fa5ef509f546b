"""Once per image: bytes -> upright RGB -> pixel values."""
