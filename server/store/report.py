"""What a server found when it checked a version: stored beside the manifest, told to whoever uploads."""

from datetime import datetime

from pydantic import BaseModel, ConfigDict, FiniteFloat


class GoldenCheck(BaseModel):
    """The golden sample, run on the server."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    texts: int
    difference: FiniteFloat
    """The largest difference of an output from what the trainer wrote down, relative to 1 + the largest output."""
    tolerance: FiniteFloat
    """What is allowed in the server's number format."""


class Report(BaseModel):
    """Only what has passed every check has one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    backbone: str
    fingerprint: str
    """The backbone that the adapter was checked on."""
    fingerprint_matched: bool
    """False where the manifest names none: then only type and sizes of the backbone were compared."""
    device: str
    dtype: str
    tensors: int
    """All of them used, of the right shape and finite."""
    parameters: int
    memory_bytes: int
    """Memory that the adapter takes there."""
    golden: GoldenCheck | None
    """None where the manifest has no golden sample."""
    smoke_texts: int
    """Texts that ran through it and gave finite outputs."""
    server: str
    """The program that checked it, e.g. `adapterd 0.3.0`."""
    checked_at: datetime

    def covers(self, fingerprint: str, dtype: str) -> bool:
        """Whether what was found holds for this backbone in this number format too."""
        return (self.fingerprint, self.dtype) == (fingerprint, dtype)
