"""Records as JSON lines, for the tests of data."""

import json

CATEGORIES = (
    "insult",
    "unfairness_and_discrimination",
    "crimes_and_illegal_activities",
    "physical_harm",
    "mental_health",
    "privacy_and_property",
    "ethics_and_morality",
    "harmless",
)
ROW = {
    "id": "a1",
    "category": "insult",
    "lang": "en",
    "split": "train",
    "prompt": "Insult 他.",
    "draft": "Wants insult.\nInsults hurt.",
    "response": "I can't.",
}


def write(path, *rows):
    """Rows as JSON lines; a string stays as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def rows(n, **fields):
    name = fields.get("category", "insult")
    return [ROW | {"id": f"{name}-{i}", "prompt": f"p{i}"} | fields for i in range(n)]
