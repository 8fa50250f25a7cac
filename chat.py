"""Talk to a model in the browser, see how a reward model scores each reply, compare replies and vote.

python chat.py                                    a page with a button that loads Qwen3-0.6B
python chat.py --model ./checkpoints/rm/RUN       score with the run's newest checkpoint, talk to its base model
python chat.py --model FOLDER_OR_HUB_ID --reward_model ./checkpoints/rm/RUN/step-500
python chat.py --demo                             the tiny built-in model and a reward model trained on its pairs
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import utils
from chat_app import model_list
from checkpointing import resolve, run_folder
from checkpointing.run_folder import step_folders
from common import flags
from common.flags import flag
from utils import UserError

with utils.lazy_imports():
    from chat_app import app, engine, server, votes
    from data_pipeline import demo

DEMO_RUN = "demo-chat"


@dataclass(frozen=True)
class ChatConfig:
    """Every setting of the page."""

    model: str = flag(model_list.DEFAULT_MODEL, "policy: a hub id or folder; for a reward checkpoint, its base model")
    reward_model: str | None = flag(None, "folder of a reward checkpoint, or of a run, whose newest checkpoint is used")
    autoload: bool = flag(False, "load the models at the start, without waiting for the button")
    output_dir: str = flag("./checkpoints/rm", "folder of the runs whose checkpoints the page offers")
    policy_dir: str = flag("./checkpoints/grpo", "folder of train_grpo.py's runs, whose replies the page shows")
    votes_file: str = flag("./preferences.jsonl", "JSONL file for votes, which train_rm.py --dataset reads")
    host: str = flag("127.0.0.1", "address to listen on; 0.0.0.0 lets the whole network in and needs --auth")
    port: int = flag(7860, "port; if the default is taken, the next free one is used", minimum=1, below=65536)
    page_host: str | None = flag(None, "name by which a reverse proxy or container publishes the page", is_list=True)
    share: bool = flag(False, "public address through Gradio's servers, for 7 days; needs --auth")
    auth: str | None = flag(None, "USER:PASS that visitors must enter")
    demo: bool = flag(False, "tiny built-in model and a reward model trained on its pairs, offline")
    debug: bool = flag(False, "show the traceback of an error")

    def problems(self) -> list[str]:
        """What is wrong with values or combinations of flags."""
        found = []
        user, _, password = (self.auth or "").partition(":")
        if self.auth is not None and not (user and password):
            found.append("--auth: expected USER:PASS, both of them")
        if self.auth is None and self.share:
            found.append("--share: a public address without --auth USER:PASS would let anyone use this machine")
        if self.auth is None and not server.is_loopback(self.host):
            found.append(f"--host: {self.host} is reachable by others, so --auth USER:PASS is needed")
        if self.demo and (self.reward_model or self.model != model_list.DEFAULT_MODEL):
            found.append("--demo: brings its own models, so leave out --model and --reward_model")
        wrong = [name for name in self.page_hosts if not server.is_host_name(name)]
        found += [f"--page_host: got {name!r}, expected a host's name without http://, port or path" for name in wrong]
        return found

    @property
    def page_hosts(self) -> list[str]:
        return self.page_host.split(",") if self.page_host is not None else []


def demo_models(output_dir: Path) -> tuple[str, Path]:
    """The demo's model, and a reward model trained on its pairs, which takes one to three minutes the first time."""
    run = output_dir / DEMO_RUN
    record = run_folder.record_or_none(run)
    if not (record and record.state == run_folder.FINISHED and step_folders(run)):
        print("training the demo's reward model, which takes one to three minutes and happens only once", flush=True)
        new_run = ["--demo", "--run_name", DEMO_RUN, "--output_dir", str(output_dir)]
        train_flags = ["--resume_from", str(run)] if step_folders(run) else new_run
        script = str(Path(__file__).with_name("train_rm.py"))
        if utils.run_child([sys.executable, script, *train_flags]) != 0:
            raise UserError("training the demo's reward model failed", where=run, next="see the message above")
    model, _ = demo.write_demo(Path("demo"))
    return str(model), resolve.sound_checkpoint(str(run))


def main(argv: list[str]) -> None:
    given, problems = flags.read_flags(ChatConfig, argv, __doc__.split("\n\n")[0])
    config = flags.build_config(ChatConfig, given, problems)
    port = server.free_port(config.host, config.port, config.port if "port" in given else config.port + 99)
    output_dir, votes_file = Path(config.output_dir), Path(config.votes_file)
    votes.check_file(votes_file)
    if config.demo:
        policy_name, reward_folder = demo_models(output_dir)
    else:
        policy_name, reward_folder = model_list.choose_models(config.model, config.reward_model)
    chat_engine = engine.ChatEngine(policy_name, reward_folder, output_dir, config.debug)
    if config.autoload or config.demo or "model" in given or "reward_model" in given:
        print(f"loading {chat_engine.policy_name}", flush=True)
        chat_engine.load()
    page = app.build_page(chat_engine, votes_file, Path(config.policy_dir))
    try:
        server.launch(page, config.host, port, config.share, config.auth, config.page_hosts)
        server.wait_for_ctrl_c()
    finally:
        page.close(verbose=False)


if __name__ == "__main__":
    sys.exit(utils.run_script(main))
