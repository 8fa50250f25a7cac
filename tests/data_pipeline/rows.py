"""Rows of preference data that several tests read, and their dialogues."""

import csv
import dataclasses
import gzip
import io
import json

from data_pipeline import parsing, sampler
from data_pipeline.reading import Source
from utils import UserError

QUESTION = {"role": "user", "content": "Is the oven hot?"}
YES = {"role": "assistant", "content": "Yes, it is."}
NO = {"role": "assistant", "content": "No."}
PROMPT = "\n\nHuman: Is the oven hot?\n\nAssistant:"
GOOD_ROW = {"chosen": f"{PROMPT} Yes, it is.", "rejected": f"{PROMPT} No."}


def parse(**row):
    return parsing.parse_pair(row, lambda problem, key="wrong_type": UserError(problem))


def read_all(path):
    """Every (row number, pair or reason) of one file, not split."""
    return [(row.row, row.pair) for row in parsing.read_pairs(Source(str(path), (path,)))]


def read_part(source):
    """Every (row number, pair or reason) of the part of a file that a source is, as `data.load_pairs` splits it."""
    rows = list(parsing.read_pairs(source))
    prompts = [(row.row, row.digests[0]) for row in rows if not isinstance(row.pair, str)]
    source = dataclasses.replace(source, holds_out_rows=sampler.shares_prompts(prompts))
    return [(row.row, row.pair) for row in rows if source.includes(*row.digests)]


def numbered_row(number, reply="Yes."):
    prompt = f"\n\nHuman: What is {number}?\n\nAssistant:"
    return {"chosen": f"{prompt} {reply}", "rejected": f"{prompt} No, and {number}."}


def write_as(path, content):
    """Write rows in the form that the path's suffix asks for; in .json the second row is on line 3."""
    suffix = path.name.removesuffix(".gz")
    if suffix.endswith(".parquet"):
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(content), path)
        return path
    if suffix.endswith(".json"):
        text = "[\n" + ",\n".join(map(json.dumps, content)) + "\n]\n"
    elif suffix.endswith(".csv"):
        out = io.StringIO()
        writer = csv.DictWriter(out, list(dict.fromkeys(name for row in content for name in row)))
        writer.writeheader()
        for row in content:
            cells = {
                name: json.dumps(value) if isinstance(value, dict | list) else value for name, value in row.items()
            }
            writer.writerow(cells)
        text = out.getvalue()
    else:
        text = "".join(json.dumps(row) + "\n" for row in content)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path
