"""modeling/pretrained.py: chat templates that are missing, dated or take no system turn; padding, heads, LoRA."""

import datetime
import json

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as bpe
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

import models
from data_pipeline import tokenization
from modeling import scorer, tokenizers
from tests.modeling.test_lengths import SIZES
from utils import UserError

SYSTEM, USER, ASSISTANT = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello?"},
    {"role": "assistant", "content": "Good day."},
)
DAY = datetime.datetime(2025, 3, 9, 12, 30)
TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
# as Llama 3.2's begins
DATED = (
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    '{%- set date_string = strftime_now("%d %b %Y") %}{%- else %}{%- set date_string = "26 Jul 2024" %}{%- endif %}'
    "{%- endif %}Today Date: {{ date_string }}\n\n" + TURNS
)
# as Gemma 2's begins
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + TURNS
)


@pytest.fixture
def save_tokenizer(tokenizer, tmp_path):
    """Save the demo's tokenizer with another chat template; returns the folder."""

    def save(template, folder="tokenizer"):
        odd = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
        )
        odd.chat_template = template
        odd.save_pretrained(tmp_path / folder)
        return str(tmp_path / folder)

    return save


@pytest.fixture
def set_clock(monkeypatch):
    """Have chat templates see another date than today's."""

    def set_to(day):
        class Clock(datetime.datetime):
            @classmethod
            def now(cls, tz=None):
                return day

        monkeypatch.setattr(chat_template_utils, "datetime", Clock)

    return set_to


def text_of(tokenizer, *messages, **options):
    return tokenizer.apply_chat_template(list(messages), tokenize=False, **options)


def save_classifier(folder, tokenizer, architecture="Llama", labels=1, **options):
    """A tiny random classifier with its tokenizer; returns the folder."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{architecture}Config")(**(SIZES | options), num_labels=labels)
    config.pad_token_id = None
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def train_words(**tokens):
    """A byte-level BPE tokenizer of 300 tokens without ChatML's markers, as GPT-2's is."""
    backend = Tokenizer(bpe.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, show_progress=False, special_tokens=[*tokens.values()], initial_alphabet=alphabet
    )
    backend.train_from_iterator(["User: Hello?\n\nAssistant: Good day. How are you today?\n"] * 50, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **tokens)


# -- Today's date ------------------------------------------------------------------------------------------------------


def test_a_fixed_date_is_saved_with_the_template_and_read_by_any_tool(save_tokenizer, tmp_path, set_clock, capsys):
    tokenizer = tokenizers.load_tokenizer(save_tokenizer(DATED), DAY)
    assert capsys.readouterr().out == "the chat template writes today's date: fixed at 2025-03-09\n"
    tokenizer.save_pretrained(tmp_path / "saved")
    set_clock(DAY + datetime.timedelta(days=1))
    for opened in (
        AutoTokenizer.from_pretrained(tmp_path / "saved"),
        tokenizers.load_tokenizer(str(tmp_path / "saved")),
    ):
        assert text_of(opened, USER).startswith("Today Date: 09 Mar 2025\n\n<|im_start|>user")
    # what is fixed stays so
    again = tokenizers.load_tokenizer(str(tmp_path / "saved"), DAY + datetime.timedelta(days=9))
    assert again.chat_template == tokenizer.chat_template and capsys.readouterr().out == ""


def test_a_template_that_writes_nothing_is_named(save_tokenizer):
    with pytest.raises(UserError, match=r"does not take a plain question and answer(.|\n)*it writes nothing"):
        tokenizers.load_tokenizer(save_tokenizer("{# nothing #}"))


def test_a_conversation_has_todays_date(save_tokenizer, set_clock):
    tokenizer = tokenizers.load_tokenizer(save_tokenizer(DATED))
    for day in (DAY, DAY + datetime.timedelta(days=1)):
        set_clock(day)
        assert f"Today Date: {day:%d %b %Y}" in text_of(tokenizer, USER)


@pytest.mark.parametrize("call", ["strftime_now('%Y-%m-%d')", 'strftime_now( format="%Y-%m-%d" )'])
def test_each_of_several_templates_has_its_date_fixed_and_is_saved(save_tokenizer, tmp_path, base, call):
    templates = {"default": "{{ " + call + " }}" + TURNS, "tool_use": "tools, {{ " + call + " }}" + TURNS}
    tokenizer = tokenizers.load_tokenizer(save_tokenizer(templates), DAY)
    models.RewardModel.create(base, tokenizer, 0).save(tmp_path / "saved")
    assert (tmp_path / "saved" / "additional_chat_templates" / "tool_use.jinja").is_file()
    opened = models.RewardModel.restore(tmp_path / "saved").tokenizer
    assert text_of(opened, USER).startswith("2025-03-09<|im_start|>")
    assert text_of(opened, USER, tools=[{"type": "function"}]).startswith("tools, 2025-03-09<|im_start|>")


@pytest.mark.parametrize(
    "beginning", ["{% set f = '%Y' %}{{ strftime_now(f) }}", "{% set now = strftime_now %}{{ now('%Y') }}"]
)
def test_a_date_that_cannot_be_fixed_is_refused_and_shown(save_tokenizer, beginning):
    folder = save_tokenizer("{# strftime_now: see above #}" + beginning + TURNS)
    assert "<|im_start|>" in text_of(tokenizers.load_tokenizer(folder), USER)
    with pytest.raises(
        UserError, match=r"today's date in a way that cannot be fixed(.|\n)*found: *strftime_now(.|\n)*next"
    ):
        tokenizers.load_tokenizer(folder, DAY)


def test_a_reward_model_with_an_open_date_gives_the_same_rewards_every_day(
    save_tokenizer, base, tmp_path, set_clock, capsys
):
    odd = tokenizers.load_tokenizer(save_tokenizer(DATED))
    models.RewardModel.create(base, odd, 0).save(tmp_path / "saved")
    assert "strftime_now(" in (tmp_path / "saved/chat_template.jinja").read_text()
    rewards, prints = [], []
    for day in (DAY, DAY + datetime.timedelta(days=30)):
        set_clock(day)
        model = models.RewardModel.restore(tmp_path / "saved").eval()
        rewards.append(model.score_dialogues([[USER, ASSISTANT]]))
        prints.append(scorer.fingerprint_of(model))
    assert rewards[0] == rewards[1] and prints[0] == prints[1]
    assert "fixed at 2024-07-26, as nothing says which one it was trained with" in capsys.readouterr().out


# -- System turns ------------------------------------------------------------------------------------------------------


def test_a_system_turn_that_the_template_rejects_begins_the_first_user_turn(save_tokenizer, tmp_path):
    tokenizer = tokenizers.load_tokenizer(save_tokenizer(NO_SYSTEM))
    tokenizer.save_pretrained(tmp_path / "saved")
    stock = AutoTokenizer.from_pretrained(tmp_path / "saved")  # the template itself does it
    moved = {"role": "user", "content": "Be brief.\n\nHello?"}
    assert text_of(stock, SYSTEM, USER, ASSISTANT, USER) == text_of(stock, moved, ASSISTANT, USER)
    assert text_of(stock, SYSTEM, ASSISTANT) == text_of(stock, {**SYSTEM, "role": "user"}, ASSISTANT)
    assert text_of(stock, {**SYSTEM, "content": " "}, USER) == text_of(stock, USER)
    assert text_of(stock, USER, ASSISTANT) == TURNS_OF_TWO
    again = tokenizers.load_tokenizer(str(tmp_path / "saved"))
    assert again.chat_template == tokenizer.chat_template, "it was put in front a second time"


TURNS_OF_TWO = "<|im_start|>user\nHello?<|im_end|>\n<|im_start|>assistant\nGood day.<|im_end|>\n"


def test_a_template_that_takes_system_turns_stays_as_it_is(save_tokenizer):
    assert tokenizers.load_tokenizer(save_tokenizer(TURNS)).chat_template == TURNS


# -- No template, and padding ------------------------------------------------------------------------------------------


def test_without_template_and_markers_a_dialogue_is_plain_words(tmp_path, capsys):
    words = train_words(eos_token="<|endoftext|>", bos_token="<|endoftext|>")
    folder = save_classifier(tmp_path / "base", words, "GPT2", vocab_size=len(words))
    tokenizer = tokenizers.load_tokenizer(folder)
    assert "has no chat template: a plain one, System: … User: … Assistant: … is used" in capsys.readouterr().out
    dialogue = [SYSTEM, USER, ASSISTANT, USER]
    assert text_of(tokenizer, *dialogue, add_generation_prompt=True) == (
        "System: Be brief.\n\nUser: Hello?\n\nAssistant: Good day.<|endoftext|>\nUser: Hello?\n\nAssistant:"
    )
    # every token of the vocabulary is in the embedding, and <|endoftext|> is the only special one
    model = models.RewardModel.create(folder, tokenizer, 0).eval()
    model.save(tmp_path / "saved")
    assert tokenizer.pad_token == "<|endoftext|>"
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
    reader = AutoTokenizer.from_pretrained(tmp_path / "saved")
    dialogues = [[USER, ASSISTANT], [USER, {**ASSISTANT, "content": "Good day, and how are you today?"}]]
    batch = reader(
        [text_of(reader, *dialogue) for dialogue in dialogues],
        padding=True,
        add_special_tokens=False,
        return_tensors="pt",
    )
    with torch.no_grad():
        assert stock(**batch).logits[:, 0].tolist() == pytest.approx(model.score_dialogues(dialogues), abs=1e-5)
    assert len({*model.score_dialogues(dialogues)}) == 2


def test_a_pad_token_beyond_the_embedding_is_not_chosen(tmp_path):
    words = train_words(eos_token="</s>", unk_token="<unk>")
    rows = len(words)
    words.add_special_tokens({"pad_token": "[PAD]"})
    words.chat_template = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    folder = save_classifier(tmp_path, words, vocab_size=rows)
    tokenizer = tokenizers.load_tokenizer(folder)
    assert tokenizer.pad_token_id == rows
    model = models.RewardModel.create(folder, tokenizer, 0).eval()
    assert (tokenizer.pad_token, model.hf_model.config.pad_token_id) == ("<unk>", tokenizer.unk_token_id)
    assert len(model.score_dialogues([[USER, ASSISTANT], [USER, ASSISTANT, USER, ASSISTANT]])) == 2
    transformers.AutoModelForCausalLM.from_pretrained(folder, pad_token_id=None).save_pretrained(tmp_path / "policy")
    words.save_pretrained(tmp_path / "policy")
    assert models.PolicyModel.create(str(tmp_path / "policy")).tokenizer.pad_token == "<unk>"


def test_a_pad_token_is_made_where_the_embedding_has_room(tmp_path):
    words = train_words(eos_token="</s>")
    words.chat_template = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    folder = save_classifier(tmp_path / "base", words, vocab_size=len(words) + 4)
    model = models.RewardModel.create(folder, tokenizers.load_tokenizer(folder), 0)
    assert (model.tokenizer.pad_token, model.tokenizer.pad_token_id) == ("<|pad|>", len(words))
    model.save(tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").pad_token_id == len(words)


def test_without_room_for_a_pad_token_the_error_says_what_to_do(tmp_path):
    words = train_words(eos_token="</s>")
    words.chat_template = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    folder = save_classifier(tmp_path, words, vocab_size=len(words))
    with pytest.raises(UserError, match=r"no special token that could serve as padding(.|\n)*</s>(.|\n)*line break"):
        models.RewardModel.create(folder, tokenizers.load_tokenizer(folder), 0)


def test_a_tokenizer_of_another_model_is_refused_and_its_token_named(tmp_path):
    words = train_words(eos_token="</s>", pad_token="<pad>")
    last = len(words) - 1
    folder = save_classifier(tmp_path, words, vocab_size=last)
    with pytest.raises(UserError, match=rf"no embedding for(.|\n)*is {last}, and the embedding has {last} rows"):
        models.RewardModel.create(folder, tokenizers.load_tokenizer(folder), 0)


def test_an_added_token_without_embedding_is_an_error_only_where_it_occurs(tmp_path):
    words = train_words(eos_token="</s>", pad_token="<pad>")
    rows = len(words)
    words.add_tokens(["<image>"], special_tokens=True)
    save_classifier(tmp_path, words, vocab_size=rows)
    model = models.RewardModel.restore(tmp_path).eval()
    shown = {**USER, "content": "See <image>"}
    assert model.score_dialogues([[USER, ASSISTANT]])
    for _ in range(2):
        with pytest.raises(UserError, match=f"found: *<image> is {rows}"):
            model.score_dialogues([[shown, ASSISTANT]])
    groups = tokenization.tokenize_groups([[[shown, ASSISTANT]]], model.tokenizer, 100)
    with pytest.raises(UserError, match=f"found: *<image> is {rows}"):
        list(scorer.Scorer(model, scorer.ScoringConfig()).rewards(groups))


# -- Heads -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture, lora", [("Llama", False), ("Llama", True), ("Bert", False)])
def test_a_head_of_two_labels_is_replaced_and_the_backbone_kept(tmp_path, tokenizer, capsys, architecture, lora):
    two = save_classifier(tmp_path / "two", tokenizer, architecture, labels=2)
    one = save_classifier(tmp_path / "one", tokenizer, architecture, labels=1)
    settings = models.LoraSettings(target_modules=("q_proj",)) if lora else None
    model = models.RewardModel.create(two, tokenizer, 7, settings).eval()
    assert f"{two} has a head with 2 labels: a new one with one label takes its place" in capsys.readouterr().out
    weights = AutoModelForSequenceClassification.from_pretrained(two).base_model.state_dict()
    for path, weight in model.backbone.state_dict().items():
        if "lora_" not in path:
            assert torch.equal(weight, weights[path.replace(".base_layer", "")]), path
    if architecture == "Llama":  # the head is the one that a base without any gets
        transformers.AutoModelForCausalLM.from_pretrained(one).save_pretrained(tmp_path / "bare")
        bare = models.RewardModel.create(str(tmp_path / "bare"), tokenizer, 7, settings)
        heads = [
            [weight for name, weight in each.trained_parameters().items() if "score" in name] for each in (model, bare)
        ]
        assert len(heads[0]) == 1 and torch.equal(heads[0][0], heads[1][0])
    model.save(tmp_path / "saved")
    again = models.RewardModel.restore(tmp_path / "saved").eval()
    assert again.score_dialogues([[USER, ASSISTANT]]) == model.score_dialogues([[USER, ASSISTANT]])


def test_a_model_of_three_labels_is_no_reward_model(tmp_path, tokenizer):
    folder = save_classifier(tmp_path, tokenizer, labels=3)
    with pytest.raises(UserError, match="this is no reward model: its head has 3 labels") as raised:
        models.RewardModel.restore(tmp_path)
    assert raised.value.exit_code == 2 and folder in str(raised.value)


@pytest.mark.parametrize("open_model", [models.RewardModel.create, models.RewardModel.restore])
def test_a_weight_of_another_shape_is_named(tmp_path, tokenizer, open_model):
    folder = save_classifier(tmp_path, tokenizer)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    with pytest.raises(UserError, match=r"another shape than its config.json says(.|\n)*mlp\.\w+\.weight of \d+ × \d+"):
        open_model(*((folder, tokenizer, 0) if open_model == models.RewardModel.create else (tmp_path,)))


def test_an_architecture_without_a_class_for_rewards_is_named(tmp_path, tokenizer):
    transformers.AutoModelForCausalLM.from_config(transformers.GraniteConfig(**SIZES)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"no model for sequence classification(.|\n)*granite"):
        models.RewardModel.create(str(tmp_path), tokenizer, 0)


# -- LoRA --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "architecture, adapted",
    [
        ("Llama", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("GPT2", {"c_attn", "c_proj", "c_fc"}),
        ("Bert", {"query", "key", "value", "dense"}),
    ],
)
def test_all_linear_adapts_every_layer_but_the_head(tmp_path, tokenizer, architecture, adapted):
    from peft import AutoPeftModelForSequenceClassification

    folder = save_classifier(tmp_path / "base", tokenizer, architecture)
    model = models.RewardModel.create(folder, tokenizer, 0, models.LoraSettings(target_modules=("all-linear",))).eval()
    paths = [path for path in model.trained_parameters() if "lora_A" in path]
    assert {path.split(".lora_A")[0].split(".")[-1] for path in paths} == adapted
    with torch.no_grad():
        for path, weight in model.trained_parameters().items():
            if "lora_B" in path:
                weight.normal_(std=0.2)
    model.save(tmp_path / "saved")
    wanted = model.score_dialogues([[USER, ASSISTANT]])
    assert wanted != models.RewardModel.create(folder, tokenizer, 0).eval().score_dialogues([[USER, ASSISTANT]])
    again = models.RewardModel.restore(tmp_path / "saved").eval()
    assert again.score_dialogues([[USER, ASSISTANT]]) == wanted
    assert again.trained_parameters().keys() == model.trained_parameters().keys()
    stock = AutoPeftModelForSequenceClassification.from_pretrained(
        tmp_path / "saved", num_labels=1, pad_token_id=tokenizer.pad_token_id
    ).eval()
    ids = torch.tensor([tokenizer.apply_chat_template([USER, ASSISTANT], return_dict=False)])
    with torch.no_grad():
        assert stock(input_ids=ids).logits.flatten().tolist() == pytest.approx(wanted, abs=1e-5)


def test_all_linear_stands_alone(base, tokenizer):
    with pytest.raises(UserError, match=r"this model has no all-linear(.|\n)*separated by commas, or all-linear"):
        models.RewardModel.create(base, tokenizer, 0, models.LoraSettings(target_modules=("q_proj", "all-linear")))


@pytest.mark.parametrize("is_classifier", [True, False], ids=["classifier", "language model"])
def test_layers_that_the_configuration_has_no_place_for_are_named(tokenizer, tmp_path, capsys, is_classifier):
    """As after a config.json that was edited, or belongs to a smaller model."""
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    config = transformers.LlamaConfig(**sizes, num_hidden_layers=3, pad_token_id=0, num_labels=1)
    kind = transformers.LlamaForSequenceClassification if is_classifier else transformers.LlamaForCausalLM
    kind(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    models.RewardModel.create(str(tmp_path), tokenizer, 0)
    assert "not used" not in capsys.readouterr().out, "a head for language is not needed"
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content | {"num_hidden_layers": 2}))
    models.RewardModel.create(str(tmp_path), tokenizer, 0)
    assert f"{tmp_path}: 9 weights of it, such as model.layers.2" in capsys.readouterr().out
