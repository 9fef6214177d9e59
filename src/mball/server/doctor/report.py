"""What an examination found, as plain data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at: what it is in words, and the numbers behind it in `data` (bytes, seconds, counts).

    `cost` says what MBALL loses where it is not `fine`, and `mend` what to do about it.
    """

    name: str
    value: str
    fine: bool = True
    cost: str = ""
    mend: str = ""
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Report:
    findings: tuple[Finding, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "fine": all(finding.fine for finding in self.findings),
            "findings": [dataclasses.asdict(finding) for finding in self.findings],
        }

    def __getitem__(self, name: str) -> Finding:
        """The finding of that name. Raises KeyError."""
        for finding in self.findings:
            if finding.name == name:
                return finding
        raise KeyError(name)
