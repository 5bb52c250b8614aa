"""A parameter of OpenAI's interface that this server does not have: its default passes, anything else is refused."""

import json
from dataclasses import dataclass
from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema


@dataclass(frozen=True)
class OnlyDefault:
    """Annotates a field that takes null and values that mean the same as leaving it out."""

    values: tuple[Any, ...] = ()

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"enum": [None, *self.values], "description": "Not supported: only its default is accepted."}

    def _check(self, value: Any) -> Any:
        # By type, too: 0 is not False, and [] no {}.
        if value is None or any(type(value) is type(known) and value == known for known in self.values):
            return None
        allowed = " or ".join(json.dumps(known) for known in self.values) or "null"
        raise PydanticCustomError("unsupported", "not supported; leave it out or give {allowed}", {"allowed": allowed})
