"""The options of an import."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from cllm_export.bundle.contract import PRECISIONS, Precision
from cllm_export.checks import OptionGroup, check_options, documented, option
from cllm_export.errors import OptionError

IMPORT_NAME = "import.json"
"""The file of an imported checkpoint that says what it was made from. A directory without it is never replaced."""


@documented
@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """The options of ``cllm-export import``.

    Raises:
        OptionError: an option is out of its range.
    """

    GROUP: ClassVar[OptionGroup] = "Input"

    sha256: str | None = option(None, help="The checksum that the file must have, as 64 hexadecimal digits.")
    dtype: Precision = option(
        "fp32",
        help="The dtype of the weights; fp32 holds every value of the file, and the others round.",
        choices=PRECISIONS,
        group="Output",
    )

    def __post_init__(self) -> None:
        check_options(self)
        if self.sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", self.sha256):
            raise OptionError(f"sha256 must be 64 hexadecimal digits, got {self.sha256!r}", fields=("sha256",))
