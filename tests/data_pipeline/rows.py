"""Rows of preference data that several tests read, and their dialogues."""

import gzip
import json

from data_pipeline import parsing
from data_pipeline.sources import Source
from utils import UserError

QUESTION = {"role": "user", "content": "Is the oven hot?"}
YES = {"role": "assistant", "content": "Yes, it is."}
NO = {"role": "assistant", "content": "No."}
PROMPT = "\n\nHuman: Is the oven hot?\n\nAssistant:"
GOOD_ROW = {"chosen": f"{PROMPT} Yes, it is.", "rejected": f"{PROMPT} No."}


def parse(**row):
    return parsing.parse_pair(row, UserError)


def read_all(path):
    """Every (row number, pair or key) of one file, not split."""
    return list(parsing.read_pairs(Source(str(path), path)))


def numbered_row(number, reply="Yes."):
    prompt = f"\n\nHuman: What is {number}?\n\nAssistant:"
    return {"chosen": f"{prompt} {reply}", "rejected": f"{prompt} No, and {number}."}


def write_as(path, content):
    """Write rows in the form that the path's suffix asks for; in .json the second row is on line 3."""
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(content), path)
    elif path.suffix == ".json":
        path.write_text("[\n" + ",\n".join(map(json.dumps, content)) + "\n]\n", encoding="utf-8")
    else:
        lines = "".join(json.dumps(row) + "\n" for row in content).encode()
        path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return path
