"""What training changes besides the weights: the chat template, and the tokens at which generation stops.

A model must be prompted with the template that it was trained with. So the template and the stop tokens are written into full checkpoints
and into adapters (transformers' own Trainer also saves tokenizer files with an adapter), and merging copies them from the adapter to the
merged model. The files are those that transformers and vLLM read: the template is chat_template.jinja, which has priority over
tokenizer_config.json; the stop tokens are eos_token_id in generation_config.json.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swift_mega.errors import UserError
from swift_mega.text_files import BOM, read_object, read_text

TEMPLATE = "chat_template.jinja"
NAMED_TEMPLATES = "additional_chat_templates"
PROCESSOR_TEMPLATE = "chat_template.json"
GENERATION = "generation_config.json"
TOKENIZER = "tokenizer_config.json"


@dataclass(frozen=True, kw_only=True)
class Trained:
    """Changes of an export to the companions of the model that training started from.

    chat_template: the Jinja text that rendered the training data, where it is not the model's own; None: the model's own is kept.
    end_tokens: ids of the tokens that end the trained replies; they are added to the model's stop tokens.
    """

    chat_template: str | None = None
    end_tokens: tuple[int, ...] = ()

    def write(self, directory: Path) -> None:
        """Edits the files of a whole model. Call it after the source's files were copied."""
        if self.chat_template is not None:
            _write_template(directory, self.chat_template)
        _write_end_tokens(directory, directory, self.end_tokens)

    def write_beside_adapter(self, directory: Path, base: str | Path) -> None:
        """Writes the same two files into an adapter's directory, where `of_adapter` reads them. base: the model that was trained."""
        if self.chat_template is not None:
            (directory / TEMPLATE).write_bytes(self.chat_template.encode())
        _write_end_tokens(directory, Path(base), self.end_tokens)


UNCHANGED = Trained()


def of_adapter(directory: str | Path) -> Trained:
    """Template and stop tokens from an adapter's directory: one of ours, or one with tokenizer files that another trainer saved."""
    folder = Path(directory)
    return Trained(chat_template=_template_of(folder), end_tokens=_ids_in(folder / GENERATION) or ())


def stop_tokens(model: str | Path) -> tuple[int, ...]:
    """Token ids at which generation with this model stops in transformers and vLLM; UserError where a file is invalid."""
    found = _ids_in(Path(model) / GENERATION)
    return (_ids_in(Path(model) / "config.json") or ()) if found is None else found


def _template_of(folder: Path) -> str | None:
    if (folder / TEMPLATE).is_file():
        return read_text(folder / TEMPLATE, what=str(folder / TEMPLATE))
    template = read_object(folder / TOKENIZER).get("chat_template") if (folder / TOKENIZER).is_file() else None
    if isinstance(template, list):
        template = _named(template).get("default")
    return template.removeprefix(BOM) if isinstance(template, str) else None


def _write_template(directory: Path, template: str) -> None:
    """Writes the template as transformers' `save_pretrained` does. Templates with other names are moved to files of their own."""
    (directory / TEMPLATE).write_bytes(template.encode())
    (directory / PROCESSOR_TEMPLATE).unlink(missing_ok=True)
    path = directory / TOKENIZER
    config = read_object(path) if path.is_file() else {}
    if "chat_template" not in config:
        return
    older = config.pop("chat_template")
    for name, text in (_named(older) if isinstance(older, list) else {}).items():
        if name != "default" and "/" not in name and not (directory / NAMED_TEMPLATES / f"{name}.jinja").exists():
            (directory / NAMED_TEMPLATES).mkdir(exist_ok=True)
            (directory / NAMED_TEMPLATES / f"{name}.jinja").write_bytes(text.encode())
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _named(templates: list[Any]) -> dict[str, str]:
    """{name: text} from the list of templates in tokenizer_config.json."""
    return {
        each["name"]: each["template"]
        for each in templates
        if isinstance(each, dict) and isinstance(each.get("name"), str) and isinstance(each.get("template"), str)
    }


def _write_end_tokens(directory: Path, base: Path, tokens: tuple[int, ...]) -> None:
    """Writes generation_config.json of `directory`: that of `base`, with `tokens` added to its eos_token_id."""
    before = stop_tokens(base)
    added = [token for token in dict.fromkeys(tokens) if token not in before]
    if not added:
        return
    config = read_object(base / GENERATION) if (base / GENERATION).is_file() else _from_model(base)
    together = [*before, *added]
    config["eos_token_id"] = together if len(together) > 1 else together[0]
    (directory / GENERATION).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _from_model(base: Path) -> dict[str, Any]:
    """The generation config that transformers derives from config.json where there is no generation_config.json."""
    from transformers import GenerationConfig

    config = read_object(base / "config.json") if (base / "config.json").is_file() else {}
    made = GenerationConfig.from_model_config(config).to_diff_dict()
    return {key: value for key, value in made.items() if not key.startswith("_")}


def _ids_in(path: Path) -> tuple[int, ...] | None:
    """The eos_token_id of a JSON file as a tuple; () where it has none, None where there is no file."""
    if not path.is_file():
        return None
    config = read_object(path)
    found = config.get("eos_token_id")
    if found is None and isinstance(config.get("text_config"), dict):
        found = config["text_config"].get("eos_token_id")
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise UserError(f"{path}: eos_token_id={found!r} is neither a token id nor a list of them; correct the file")
    return tuple(ids)
