"""A model's chat template: messages to the one prompt text that the model was tuned on.

Not here: encoding. The rendered text has its special tokens written out already, so encode it
with `add_special_tokens=False`.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parallel.errors import ConfigError, IntegrityError
from runner.config.json_file import read_json_object, read_text

if TYPE_CHECKING:
    from jinja2.sandbox import ImmutableSandboxedEnvironment


class ChatTemplate:
    """A compiled template; renders as `apply_chat_template(tokenize=False)` of transformers does.

    Templates come with a model and are foreign code: they run in Jinja's immutable sandbox, with no
    loader, and anything they raise becomes a ConfigError.
    """

    def __init__(self, source: str, *, special_tokens: Mapping[str, str], origin: str) -> None:
        """Compile `source`.

        Args:
            special_tokens: by role, as in `{"bos_token": "<s>"}`; variables of the template.
            origin: the file the template came from, for error messages.

        Raises:
            ConfigError: a syntax error in the template.
        """
        self.origin = origin
        self._special_tokens = dict(special_tokens)
        with _blaming(origin):
            self._template = _sandbox().from_string(source)

    @classmethod
    def load(cls, model_dir: Path, *, special_tokens: Mapping[str, str]) -> "ChatTemplate":
        """The template of a model folder; a file of its own goes before tokenizer_config.json.

        Raises:
            ConfigError: the folder has no chat template, or one that does not compile.
            IntegrityError: a file that should hold it is corrupt.
        """
        source, origin = _find(model_dir)
        return cls(source, special_tokens=special_tokens, origin=str(origin))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The prompt for a conversation.

        Args:
            messages: `{"role": ..., "content": ...}` each, oldest first. A key whose value is None
                is left out, since templates ask whether a key is there.
            add_generation_prompt: end with the header that makes the model answer.
            variables: what else this template reads, such as `enable_thinking` or `tools`.

        Raises:
            ConfigError: no messages, or the template rejects them (roles out of order, ...).
        """
        if not messages:
            raise ConfigError("messages is empty; give at least one message")
        conversation = [{k: v for k, v in m.items() if v is not None} for m in messages]
        # Named but empty, as transformers passes them: templates ask `tools is not none`.
        absent = {"tools": None, "documents": None}
        with _blaming(self.origin):
            return self._template.render(
                {
                    **absent,
                    **self._special_tokens,
                    **variables,
                    "messages": conversation,
                    "add_generation_prompt": add_generation_prompt,
                }
            )


@contextmanager
def _blaming(origin: str) -> Iterator[None]:
    """Turn whatever a template raises into one line that names the template."""
    try:
        yield
    except Exception as error:  # foreign code may raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        line = getattr(error, "lineno", None)
        where = origin if line is None else f"{origin}, line {line}"
        raise ConfigError(f"chat template ({where}): {reason}") from error


def _find(model_dir: Path) -> tuple[str, Path]:
    """The template's source and the file it stands in."""
    path = model_dir / "chat_template.jinja"
    if path.is_file():
        return read_text(path), path
    for name in ("chat_template.json", "tokenizer_config.json"):
        path = model_dir / name
        value = read_json_object(path, optional=True).get("chat_template")
        if value is not None:
            return _default_of(value, path), path
    raise ConfigError(
        f"{model_dir} has no chat template (chat_template.jinja, or chat_template in "
        "tokenizer_config.json); send a plain prompt, or add the template of the model"
    )


def _default_of(value: Any, path: Path) -> str:
    """A template alone, or the one named "default" of `[{"name": ..., "template": ...}, ...]`."""
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        named = {entry.get("name"): entry.get("template") for entry in value}
        if "default" not in named:
            raise ConfigError(
                f"{path} names the chat templates {', '.join(map(str, named))}; "
                'name the one to use "default"'
            )
        value = named["default"]
    if not isinstance(value, str):
        raise IntegrityError(f"chat_template of {path} is neither text nor a list of named ones")
    return value


def _sandbox() -> "ImmutableSandboxedEnvironment":
    """The environment that model authors write templates for."""
    from jinja2 import TemplateError, ext, nodes
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationBlock(ext.Extension):
        """`{% generation %}` marks what training counts as the answer; here it is only a scope."""

        tags = {"generation"}  # noqa: RUF012 - the base class declares it so

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[ext.loopcontrols, GenerationBlock]
    )
    # Jinja's own filter escapes HTML characters, which no model was trained on.
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
