"""What `tools/count.py` counts of a small package."""

from __future__ import annotations

from pathlib import Path

from tools.count import count, forms, table


def test_a_package_is_counted(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "one.py").write_text("class A(Protocol):\n    def f(self):\n        pass\n\n\nB = 1\n")
    (tmp_path / "sub" / "two.py").write_text("@dataclass\nclass InputRow:\n    x: int\n")
    found = count(tmp_path)
    assert (found["all"].files, found["all"].lines, found["all"].classes) == (2, 9, 2)
    assert (found["."].protocols, found["sub"].dataclasses, found["all"].median) == (1, 1, 2)
    assert len(list(table(tmp_path))) == 5
    assert "MISSING" not in next(line for line in forms(found["all"].names) if "InputRow" in line)
