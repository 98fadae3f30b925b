# SPDX-License-Identifier: Apache-2.0
"""Copies photos into the folder that `metalora evaluate --data` reads, from a list of files.

    python examples/make_evaluation_folder.py photos.csv people

The list has the columns `person` and `file` (relative to the list), and may have `reference` (1 for the photo that is
learned from; else a person's first), `text` (its caption) and any others, such as `sex` and `age`, which become tags.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
from pathlib import Path


def make_folder(table: Path, output: Path) -> int:
    """Copy the photos and write metadata.jsonl and people.json.

    Returns:
        The number of people.

    Raises:
        ValueError: a column is missing, or a person's name is no folder name. FileNotFoundError: a photo is missing.
    """
    with table.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    people, tags = {}, {}
    for row in rows:
        if not row.get("person") or not row.get("file"):
            raise ValueError(f"{table}: expected columns person and file in each line, found {row}")
        if Path(row["person"]).name != row["person"] or row["person"].startswith("."):
            raise ValueError(f"{table}: expected a name that a folder can have, found {row['person']!r}")
        if not (table.parent / row["file"]).is_file():
            raise FileNotFoundError(f"{table}: expected a photo, found no file {table.parent / row['file']}")
        people.setdefault(row["person"], []).append(row)
    for person, photos in people.items():
        folder = output / person
        folder.mkdir(parents=True, exist_ok=True)
        lines = []
        for number, row in enumerate(photos):
            name = f"{number}{Path(row['file']).suffix.lower()}"
            shutil.copyfile(table.parent / row["file"], folder / name)
            text = {"text": row["text"]} if row.get("text") else {}
            lines.append(json.dumps({"file_name": name, "reference": row.get("reference") == "1", **text}) + "\n")
        (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
        known = {"person", "file", "reference", "text"}
        tags[person] = {name: value for name, value in photos[0].items() if name not in known and value}
    (output / "people.json").write_text(json.dumps(tags, indent=1) + "\n", encoding="utf-8")
    return len(people)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path)
    parser.add_argument("output", type=Path)
    given = parser.parse_args()
    print(f"wrote {make_folder(given.table, given.output)} people to {given.output}")
