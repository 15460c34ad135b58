"""`Section`: what all sections of the configuration share, and the types of their values."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0)]
Text = Annotated[str, Field(min_length=1)]
DeviceIndex = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    """What all sections share: no unknown keys, no conversions, no change after reading."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )
