"""Texts that types and formats stand for, as patterns: pydantic then takes the answer."""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING, Any

from edge_vlm.errors import PromptError

if TYPE_CHECKING:
    from pydantic.json_schema import GenerateJsonSchema

_HEX = "[0-9a-f]"
_OCTET = "(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_IPV4 = rf"{_OCTET}(?:\.{_OCTET}){{3}}"
_GROUP = f"{_HEX}{{1,4}}"
_IPV6 = "|".join(
    [f"(?:{_GROUP}:){{7}}{_GROUP}", f"(?:{_GROUP}:){{1,7}}:", f":(?::{_GROUP}){{1,7}}"]
    + [f"(?:{_GROUP}:){{1,{7 - n}}}(?::{_GROUP}){{1,{n}}}" for n in range(1, 7)]
)
_IPV6 = f"(?:{_IPV6}|::)"
_IPV4_WITH = f"{_IPV4}(?:/(?:3[0-2]|[12]?[0-9]))?"
_IPV6_WITH = f"{_IPV6}(?:/(?:12[0-8]|1[01][0-9]|[1-9]?[0-9]))?"
# Networks: their bits behind the prefix are zero.
_NETWORK4 = "|".join(
    [f"{_IPV4}(?:/32)?", r"0\.0\.0\.0/0"]
    + [
        rf"{''.join([_OCTET + chr(92) + '.'] * whole)}(?:{'|'.join(map(str, range(0, 256, step)))})"
        rf"{'.0' * (3 - whole)}/{8 * whole + bits}".replace(".0", r"\.0")
        for whole in range(4)
        for bits, step in ((n, 256 >> n) for n in range(1, 9))
        if whole * 8 + bits < 32
    ]
)
_NETWORK6 = "|".join(
    [f"{_IPV6}(?:/128)?", "::/0", *(f"(?:{_GROUP}:){{{n}}}:/{16 * n}" for n in range(1, 8))]
)
_YEAR = "(?:[0-9]{3}[1-9]|[0-9]{2}[1-9]0|[0-9][1-9]00|[1-9]000)"
_BY_FOUR = "(?:0[48]|[2468][048]|[13579][26])"
_DATE = (
    f"(?:{_YEAR}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])"
    "|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|02-(?:0[1-9]|1[0-9]|2[0-8]))"
    f"|(?:[0-9]{{2}}{_BY_FOUR}|{_BY_FOUR}00)-02-29)"
)
_TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,6})?"
_ZONE = "(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
_N = "[0-9]{1,6}"
_DURATION = (
    f"-?P(?:{_N}D)?T(?:{_N}H(?:{_N}M)?(?:{_N}S)?|{_N}M(?:{_N}S)?|{_N}S)|-?P{_N}D"  # days, hours
)
_REAL = r"[0-9]{1,15}(?:\.[0-9]{1,15})?"

# Formats that llguidance does not know; an empty pattern is any text.
FORMATS = {
    **{
        f"uuid{n}": f"^{_HEX}{{8}}-{_HEX}{{4}}-{n}{_HEX}{{3}}-[89ab]{_HEX}{{3}}-{_HEX}{{12}}$"
        for n in (1, 3, 4, 5, 6, 7, 8)
    },
    "ipvanyaddress": f"^(?:{_IPV4}|{_IPV6})$",
    "ipv4interface": f"^{_IPV4_WITH}$",
    "ipv6interface": f"^{_IPV6_WITH}$",
    "ipvanyinterface": f"^(?:{_IPV4_WITH}|{_IPV6_WITH})$",
    "ipv4network": f"^(?:{_NETWORK4})$",
    "ipv6network": f"^(?:{_NETWORK6})$",
    "ipvanynetwork": f"^(?:{_NETWORK4}|{_NETWORK6})$",
    "fraction": r"^-?[0-9]{1,15}(?:/[1-9][0-9]{0,14})?$",
    "password": "",
    "path": r"^[^\x00]+$",
    "binary": "",
}


def _url(schemes: list[str] | None) -> str:
    """A URL of one of these schemes, of any without them, in ASCII."""
    scheme = "|".join(map(re.escape, schemes)) if schemes else "[a-z][a-z0-9]{1,15}"
    label = "[a-z][a-z0-9]{0,30}(?:-[a-z0-9]{1,30})?"
    users = r"(?:[A-Za-z0-9._~-]{1,30}(?::[A-Za-z0-9._~-]{1,30})?@)?" if schemes else ""
    tail = r"(?:[/?](?:[A-Za-z0-9._~!$&'()*+,;=:@/?-]|%[0-9A-F]{2}){0,500})?"
    if schemes == ["file"]:
        return f"^file://{tail.removesuffix('?').replace('?]', ']')}$"
    port = "(?::[1-9][0-9]{0,3})?" if schemes else ""
    return rf"^(?:{scheme})://{users}{label}(?:\.{label}){{0,5}}{port}{tail}$"


def _zoned(schema: Any) -> str:
    zone = schema.get("tz_constraint")
    return "" if zone == "naive" else _ZONE if zone is not None else f"{_ZONE}?"


@cache
def generator() -> type[GenerateJsonSchema]:
    """What describes types to pydantic's ``json_schema``, so that each answer of it is valid."""
    from pydantic.json_schema import GenerateJsonSchema

    def text(pattern: str) -> dict[str, Any]:
        return {"type": "string", "pattern": pattern}

    class Generator(GenerateJsonSchema):
        def url_schema(self, schema: Any) -> dict[str, Any]:
            return text(_url(schema.get("allowed_schemes")))

        def multi_host_url_schema(self, schema: Any) -> dict[str, Any]:
            return text(_url(schema.get("allowed_schemes")))

        def date_schema(self, schema: Any) -> dict[str, Any]:
            return text(f"^{_DATE}$")

        def time_schema(self, schema: Any) -> dict[str, Any]:
            return text(f"^{_TIME}{_zoned(schema)}$")

        def datetime_schema(self, schema: Any) -> dict[str, Any]:
            return text(f"^{_DATE}T{_TIME}{_zoned(schema)}$")

        def timedelta_schema(self, schema: Any) -> dict[str, Any]:
            return text(f"^(?:{_DURATION})$")

        def complex_schema(self, schema: Any) -> dict[str, Any]:
            return text(f"^-?{_REAL}[+-]{_REAL}j$")

        def decimal_schema(self, schema: Any) -> dict[str, Any]:
            """A number: the text that pydantic would take too may be any."""
            found: dict[str, Any] = {"type": "number"}
            names = {"ge": "minimum", "le": "maximum", "gt": "exclusiveMinimum"}
            for name, keyword in {**names, "lt": "exclusiveMaximum"}.items():
                if schema.get(name) is not None:
                    found[keyword] = float(schema[name])
            places, digits = schema.get("decimal_places"), schema.get("max_digits")
            if digits is not None:
                places = 0 if places is None else places
                most = float(10 ** (digits - places) - 1)
                found["minimum"] = max(found.get("minimum", -most), -most)
                found["maximum"] = min(found.get("maximum", most), most)
            if schema.get("multiple_of") is not None:
                found["multipleOf"] = float(schema["multiple_of"])
            elif places is not None:
                found |= {"multipleOf": 10.0**-places} if places else {"type": "integer"}
            return found

        def str_schema(self, schema: Any) -> dict[str, Any]:
            found = super().str_schema(schema)
            if schema.get("strip_whitespace") and "pattern" not in found and "minLength" in found:
                found["pattern"] = r"^\S(?s:.*\S)?$"  # space around it does not count
            return found

        def json_schema(self, schema: Any) -> dict[str, Any]:
            raise PromptError("schema: text that holds JSON cannot be promised; use its type")

    return Generator
