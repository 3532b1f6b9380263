"""The schema's `data` part: where examples come from, how they are read, written and packed.

In: a mapping. Out: a frozen DataConfig. Imports pydantic only.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from orchestrator.strict import PositiveInt, Strict, Switch

BUILTIN_DATASETS = ("stdlib-docs",)
MIB = 1 << 20

FormatName = Literal["prompt_completion", "instruction", "chat", "text"]
TemplateName = Literal["plain", "chat"]
Overlong = Literal["error", "truncate", "split", "drop"]


class FieldNames(Strict):
    """Names of the dataset's columns."""

    prompt: str = "prompt"
    """What the model is given; for format: prompt_completion."""

    completion: str = "completion"
    """What the model learns to answer; for format: prompt_completion."""

    instruction: str = "instruction"
    """What is to be done; for format: instruction."""

    input: str = "input"
    """What it is to be done with; a row without it has none. For format: instruction."""

    output: str = "output"
    """What the model learns to answer; for format: instruction."""

    messages: str = "messages"
    """The list of messages; for format: chat."""

    role: str = "role"
    """Who says a message: system, user, assistant or tool; ShareGPT's human and gpt are known."""

    content: str = "content"
    """What a message says: text, or a list of parts of type text."""

    tools: str = "tools"
    """The functions that the model may call, as a list or as JSON; a row without it has none. For
    format: chat."""

    text: str = "text"
    """The whole text; for format: text."""


class SourceConfig(Strict):
    path: str = Field(min_length=1)
    """A file, a folder, a glob, any fsspec URL of these, a `datasets` hub id, a folder that
    `save_to_disk` wrote, or `stdlib-docs`."""

    weight: Annotated[float, Field(gt=0)] = 1.0
    """How often each training example comes in an epoch. 2: twice. 0.5: half of the examples come,
    the first ones by content hash."""

    name: str | None = None
    """The configuration of a hub dataset that has several. Refused for other sources."""

    split: str = "train"
    """The split of a hub dataset or a saved one. Refused for other sources."""

    revision: str | None = None
    """Branch, tag or commit of a hub dataset. Refused for other sources."""

    format: FormatName | None = None
    """null: data.format."""

    template: TemplateName | None = None
    """null: data.template."""

    fields: FieldNames | None = None
    """null: data.fields."""


Source = str | SourceConfig
Sources = Source | Annotated[tuple[Source, ...], Field(min_length=1)]


class DataConfig(Strict):
    train: Sources
    """A JSONL, JSON, CSV, Parquet, Arrow or text file (`.gz` and `.zst` too), a folder or a glob of
    them, any fsspec URL, a `datasets` hub id, a folder that `save_to_disk` wrote, or `stdlib-docs`:
    question and answer pairs made from the docstrings of the installed Python standard library. A
    mapping {path, weight, name, split, revision, format, template, fields} says more of it. A list
    of these is a mixture."""

    held_out: Sources | None = None
    """Evaluation examples, given like `train`. Without it a part of `train` is held out."""

    held_out_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Part of `train` that is held out, chosen by a hash of each example's content, so that an
    example stays on its side when others are added. Not used when `held_out` is given."""

    max_train_examples: PositiveInt | None = None
    """Use at most this many different training examples, the first ones by content hash: of each
    source as many as its size times its weight asks for. One that a weight above 1 makes come again
    in an epoch counts once."""

    max_held_out_examples: PositiveInt | None = 256
    """Evaluate on at most this many examples, the first ones by content hash."""

    deduplicate: Switch = False
    """Leave out a training example that is equal to an earlier one but for white space. Without it
    such examples are counted and reported."""

    decontaminate: Switch = False
    """Leave out a training example that is equal to a held-out one but for white space. Without it
    such examples are counted and reported."""

    format: FormatName = "prompt_completion"
    """prompt_completion: the loss is on the completion. instruction: on the output. chat: a list of
    messages, the loss is on the assistant's turns. text: the loss is on every token."""

    template: TemplateName = "plain"
    """How a prompt and a completion become text: `chat` puts them through the tokenizer's chat
    template as a user and an assistant turn, `plain` joins them (for format: instruction with
    Alpaca's headings). `format: chat` always uses the chat template."""

    fields: FieldNames = FieldNames()
    """Names of the columns to read."""

    sample_by: Literal["line", "paragraph", "document"] = "line"
    """What one example of a text file is: a line, a paragraph (blank lines part them) or the whole
    file."""

    block_length: PositiveInt = 1024
    """Tokens in one packed block. Several documents share a block; attention stays within each."""

    overlong: Overlong = "error"
    """What happens to an example of more than `block_length` tokens. truncate cuts its end off,
    split makes several documents of it."""

    on_bad_row: Literal["error", "skip"] = "error"
    """What happens to a row that cannot be used: error ends the preparation with its file, line and
    reason; skip leaves it out, counts it and lists it in the shard's record."""

    max_row_bytes: PositiveInt = 4 * MIB
    """A longer row is a bad row: to tokenise it takes about 130 times its bytes of memory."""

    slice_bytes: PositiveInt = 8 * MIB
    """About as much text as one sharding task reads, and so the size of one shard."""

    shards_dir: str | None = None
    """A folder or fsspec URL that all nodes reach, to keep the shards in. null: the user's cache
    folder (ORCHESTRATOR_CACHE)."""

    @property
    def train_name(self) -> str:
        """The training sources in a few words, for people."""
        return ", ".join(source.path for source in self.train_sources)

    @property
    def train_sources(self) -> tuple[SourceConfig, ...]:
        return _sources(self.train)

    @property
    def held_out_sources(self) -> tuple[SourceConfig, ...]:
        """Empty where a part of the training data is held out."""
        return _sources(self.held_out) if self.held_out is not None else ()

    @property
    def prompt_template(self) -> TemplateName:
        """How a prompt is written for an adapter that was trained on these data: as the first
        source's were."""
        read = self.reading
        return "chat" if read["format"] == "chat" else read["template"]

    @property
    def reading(self) -> dict[str, Any]:
        """How rows become examples, as fields of a DataConfig, for whoever reads others with an
        adapter that was trained on these data: as the first source's did."""
        first = self.train_sources[0]
        return {
            "format": first.format or self.format,
            "template": first.template or self.template,
            "fields": (first.fields or self.fields).model_dump(mode="json"),
            "sample_by": self.sample_by,
            "block_length": self.block_length,
            "overlong": self.overlong,
        }

    @model_validator(mode="after")
    def _templates_fit_formats(self) -> "DataConfig":
        for source in (*self.train_sources, *self.held_out_sources):
            template = source.template or self.template
            if (source.format or self.format) == "text" and template == "chat":
                raise ValueError(
                    "template: chat needs format: prompt_completion, instruction or chat, "
                    "but got format: text"
                )
        return self

    @model_validator(mode="after")
    def _held_out_has_no_weights(self) -> "DataConfig":
        for source in self.held_out_sources:
            if source.weight != 1:
                raise ValueError(
                    "a held-out source has no weight, since each example is evaluated once, "
                    f"but got weight={source.weight}: remove it"
                )
        return self


def _sources(written: Sources) -> tuple[SourceConfig, ...]:
    items = written if isinstance(written, tuple) else (written,)
    return tuple(SourceConfig(path=item) if isinstance(item, str) else item for item in items)
