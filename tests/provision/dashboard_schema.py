"""What CloudWatch takes as a dashboard's body, after its API reference: Dashboard Body Structure and Syntax."""

from __future__ import annotations

from typing import Any

RENDERING = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        **{name: {"type": "string"} for name in ("color", "label", "stat", "expression", "region", "accountId")},
        "id": {"type": "string", "pattern": "^[a-z][a-zA-Z0-9_]*$"},
        "period": {"type": "integer", "minimum": 1},
        "visible": {"type": "boolean"},
        "yAxis": {"enum": ["left", "right"]},
    },
}
METRIC = {
    "oneOf": [
        {  # a metric math expression
            "type": "array",
            "minItems": 1,
            "maxItems": 1,
            "items": RENDERING | {"required": ["expression"]},
        },
        {  # a namespace, a metric, its dimensions' names and values, and how it is drawn
            "type": "array",
            "minItems": 3,
            "prefixItems": [{"type": "string"}, {"type": "string"}],
            "items": {"anyOf": [{"type": "string"}, RENDERING | {"not": {"required": ["expression"]}}]},
        },
    ]
}
AXIS = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "min": {"type": "number"},
        "max": {"type": "number"},
        "label": {"type": "string"},
        "showUnits": {"type": "boolean"},
    },
}
PROPERTIES: dict[str, dict[str, Any]] = {
    "alarm": {
        "required": ["alarms"],
        "properties": {
            "alarms": {
                "type": "array",
                "minItems": 1,
                "maxItems": 100,
                "items": {"pattern": "^arn:aws[a-z-]*:cloudwatch:"},
            },
            "sortBy": {"enum": ["default", "stateUpdatedTimestamp", "timestamp"]},
            "states": {"type": "array", "items": {"enum": ["ALARM", "INSUFFICIENT_DATA", "OK"]}},
            "title": {"type": "string"},
        },
    },
    "metric": {
        "required": ["metrics", "region"],
        "properties": {
            "metrics": {"type": "array", "minItems": 1, "maxItems": 500, "items": METRIC},
            "region": {"type": "string"},
            "title": {"type": "string"},
            "view": {"enum": ["timeSeries", "singleValue", "gauge", "bar", "pie", "table"]},
            "stacked": {"type": "boolean"},
            "stat": {
                "type": "string",
                "pattern": "^(SampleCount|Average|Sum|Minimum|Maximum|p[0-9]{1,2}([.][0-9]+)?)$",
            },
            "period": {"type": "integer", "minimum": 1},
            "yAxis": {"type": "object", "additionalProperties": False, "properties": {"left": AXIS, "right": AXIS}},
        },
    },
}
PLACE = {
    "x": {"type": "integer", "minimum": 0, "maximum": 23},
    "y": {"type": "integer", "minimum": 0},
    "width": {"type": "integer", "minimum": 1, "maximum": 24},
    "height": {"type": "integer", "minimum": 1, "maximum": 1000},
}
WIDGETS = [
    {
        "type": "object",
        "additionalProperties": False,
        "required": ["type", "properties"],
        "properties": {
            **PLACE,
            "type": {"const": kind},
            "properties": {"type": "object", "additionalProperties": False, **known},
        },
    }
    for kind, known in PROPERTIES.items()
]
SCHEMA = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "required": ["widgets"],
    "additionalProperties": False,
    "properties": {"widgets": {"type": "array", "maxItems": 500, "items": {"oneOf": WIDGETS}}},
}
