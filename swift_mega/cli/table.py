"""The table of verbs: options, help, and the function that runs each verb."""

from collections.abc import Callable

from swift_mega.cli.arguments import Option, Verb
from swift_mega.cli.talk import MAX_NEW_TOKENS, infer
from swift_mega.cli.verbs import compare, config, convert, export, plan, train, verify

TRAINING_ONLY = (
    *("parallel.distributed_optimizer", "parallel.overlap_grad_reduce", "parallel.overlap_param_gather"),
    *("parallel.ddp_bucket_size", "parallel.gradients_in_float32"),
    # Context ranks have the same weights.
    *("parallel.context", "parallel.cp", "parallel.ulysses"),
)


PLANNED = (
    *("model.path", "model.dtype", "model.dequantize", "model.megatron", "model.vocab_divisible_by", "data.max_length"),
    *("tuner.type", "tuner.rank", "tuner.target_modules", "train.micro_batch_size", "train.global_batch_size"),
    *("train.recompute", "train.recompute_method", "train.recompute_layers", "train.tile_mlp", "train.mlp_tile_size"),
    *("train.kernels", "train.kernels_by_op"),
    *("train.loss_chunk_size", "train.offload_activations", "optim.cpu_offload", "optim.offload_fraction"),
)


def _only(*keys: str) -> Callable[[str], bool]:
    return lambda key: key in keys


def _parallel_and(*keys: str) -> Callable[[str], bool]:
    return lambda key: key in keys or (key.startswith("parallel.") and key not in TRAINING_ONLY)


NPROC = Option(
    name="nproc",
    value="N",
    help="ranks to start on this machine; default NPROC_PER_NODE or 1. Not under torchrun, which has started them",
)
OUTPUT = Option(name="output", value="DIR", help="directory to write; must be absent or empty")
OVERWRITE = Option(
    name="overwrite",
    value="true|false",
    help="replace the existing files, once the new ones are complete",
    kind="switch",
)


def _side(letter: str, role: str) -> tuple[Option, ...]:
    """The options of one side of a comparison. letter: a or b."""
    return (
        Option(name=letter, value="DIR", help=f"{role}: a Hugging Face or a Megatron directory"),
        Option(
            name=f"{letter}_model",
            value="DIR",
            help="config and tokenizer for a Megatron directory that swift-mega did not write",
        ),
        Option(name=f"{letter}_adapter", value="DIR", help="directory of a PEFT LoRA adapter to apply"),
        Option(
            name=f"{letter}_backend",
            aliases=(f"{letter}_engine",),
            value="mcore|hf",
            help="Megatron-core or transformers; default: mcore where the model_type is supported",
            choices=("mcore", "hf"),
        ),
        Option(
            name=f"{letter}_layout", value="NAME", help="layout of Megatron's ranks, such as tp2-sp; default: single"
        ),
    )


_ALL = (
    Verb(
        name="sft",
        summary="fine-tune on conversations",
        description="Fine-tune a Hugging Face model on conversations, in any layout, and write Hugging Face files. "
        "Starts the ranks itself, or joins those of torchrun.",
        usage=("sft [recipe.yaml] [key=value …] [--flag value …] [--nproc N]",),
        options=(NPROC,),
        takes=lambda key: True,
        recipe=True,
        run=train,
    ),
    Verb(
        name="pt",
        summary="pretrain: loss on every token, all parameters trained",
        description="As sft, with the loss on every token and all parameters trained, unless the settings say otherwise.",
        usage=("pt [recipe.yaml] [key=value …] [--flag value …] [--nproc N]",),
        options=(NPROC,),
        takes=lambda key: True,
        recipe=True,
        defaults=(("data.loss_on", "all"), ("tuner.type", "full")),
        run=train,
    ),
    Verb(
        name="convert",
        summary="Hugging Face to Megatron-core files, and back",
        description="Write a Hugging Face model as a Megatron-core checkpoint in a layout, such a checkpoint as a "
        "Hugging Face model, or a Hugging Face model in another dtype or file size. Every tensor is accounted for, or nothing "
        "is written.",
        usage=(
            "convert --model DIR --to mcore --output DIR [--tp 2 …] [--dry_run true]",
            "convert --mcore DIR --to hf --output DIR [--model DIR]",
            "convert --model DIR --to hf --output DIR [--torch_dtype bfloat16] [--max_shard_size 5GB]",
        ),
        options=(
            Option(name="to", value="mcore|hf", help="format to write", choices=("mcore", "hf")),
            Option(
                name="mcore",
                value="DIR",
                help="the Megatron-core checkpoint to read (with --to hf); --model then has its config and tokenizer, where "
                "swift-mega did not write it",
            ),
            Option(
                name="dry_run",
                value="true|false",
                help="only check, and show which parameters each rank would have and read",
                kind="switch",
            ),
            OUTPUT,
            OVERWRITE,
        ),
        takes=_parallel_and(
            *("model.path", "model.dtype", "model.dequantize", "export.max_shard_size"),
            *("model.resize_vocab", "model.new_special_tokens", "model.new_rows"),
        ),
        run=convert,
    ),
    Verb(
        name="export",
        summary="merge an adapter into its model; write a model in FP8",
        description="Write the model with the adapter merged into its weights, as Hugging Face files. The model is the one "
        "that the adapter names, unless --model is given. Or write a model with its linears in FP8, in blocks of 128 x 128, "
        "as DeepSeek and Qwen publish them.",
        usage=(
            "export --adapters DIR --merge_lora true [--model DIR] [--output DIR]",
            "export --model DIR --quant_method fp8 [--output DIR]",
        ),
        options=(
            Option(
                name="output",
                value="DIR",
                help="directory to write; default: the adapter's directory with -merged, the model's with -fp8",
            ),
            Option(name="quant_method", value="fp8", help="format of the linears' weights", choices=("fp8",)),
            OVERWRITE,
        ),
        takes=_only("model.path", "model.adapters", "model.dequantize", "export.merge_lora", "export.max_shard_size"),
        run=export,
    ),
    Verb(
        name="infer",
        summary="generate answers, with or without an adapter",
        description="Greedy answers by the Hugging Face model: to one prompt, to every row of a JSONL file, or in a "
        "conversation on the terminal (clear starts a new one, exit ends it).",
        usage=(
            "infer --model DIR [--adapters DIR] [--chat_template FILE.jinja] "
            "[--prompt TEXT | --input FILE.jsonl --output FILE.jsonl]",
        ),
        options=(
            Option(name="prompt", value="TEXT", help="one question"),
            Option(name="input", value="FILE", help="JSONL rows with messages or query, read as training reads them"),
            Option(
                name="output", value="FILE", help="file for the rows with their responses; default: they are printed"
            ),
            Option(name="max_new_tokens", value="N", help=f"most tokens of an answer; default {MAX_NEW_TOKENS}"),
            OVERWRITE,
        ),
        takes=_only(
            *("model.path", "model.adapters", "model.dequantize", "data.system", "data.chat_template", "data.columns"),
            *("data.dataset_info", "data.model_name", "data.model_author"),
        ),
        run=infer,
    ),
    Verb(
        name="verify",
        summary="prove that layouts compute what Hugging Face does",
        description="For each layout, the largest difference of logits, loss and gradients from Hugging Face, as a table. "
        "Exits with 1 beyond the tolerance.",
        usage=(
            "verify --model DIR [--layouts tp2,pp2,tp2-pp2-sp] [--tolerance X] [--prompts FILE] "
            "[--tuner lora|full] [--adapters DIR]",
            "verify --model DIR --files true",
        ),
        options=(
            Option(name="layouts", value="NAME,…", help="layouts by name, such as tp2 or tp2-pp2-sp", kind="many"),
            Option(name="tolerance", value="X", help="largest difference that is accepted"),
            Option(name="prompts", value="FILE", help="text file, one prompt a line, or a .jsonl data set"),
            Option(
                name="files",
                value="true|false",
                help="only check the bytes of every tensor against the directory's report.json",
                kind="switch",
            ),
            Option(
                name="tuner",
                value="lora|full",
                help="which parameters' gradients are compared",
                choices=("lora", "full"),
            ),
        ),
        takes=_only("model.path", "model.adapters", "model.dtype", "model.dequantize"),
        run=verify,
    ),
    Verb(
        name="compare",
        summary="find the first layer where two checkpoints differ",
        description="Run two checkpoints on the same prompts and compare the output of every layer, of the final norm, and the "
        "logits. Exits with 1 where a point is beyond the tolerance, and names the first one.",
        usage=(
            "compare --a DIR --b DIR [--a_layout tp2-sp] [--b_backend hf] [--prompts FILE] [--tolerance X] [--json FILE] "
            "[--plot FILE.png]",
        ),
        options=(
            *_side("a", "the reference"),
            *_side("b", "the checkpoint that is compared with it"),
            Option(
                name="prompts",
                value="FILE",
                help="text file, one prompt a line, or a .jsonl data set; default: a few sentences",
            ),
            Option(name="tokenizer", value="DIR", help="directory of the tokenizer for both; default: their own"),
            Option(
                name="tolerance",
                value="X",
                help="largest relative difference that is accepted; default 1e-4, in float64 1e-5, in bfloat16 0.2",
            ),
            Option(name="top_k", value="N", help="how many of the likeliest tokens are compared; default 5"),
            Option(name="scratch", value="DIR", help="folder for A's hidden states while B runs"),
            Option(name="json", value="FILE", help="JSON file for the results"),
            Option(name="plot", value="FILE.png", help="PNG file for a plot of the difference by layer"),
        ),
        takes=_only("model.dtype", "model.dequantize"),
        run=compare,
    ),
    Verb(
        name="plan",
        summary="estimate the GPU memory of a run, and the longest row that fits",
        description="The memory of the fullest rank, part by part, and the longest row of tokens that fits, by arithmetic: no "
        "GPU, no weights, only the model's config.json. Exits with 1 where rows of max_length tokens do not fit.",
        usage=("plan --model DIR [--ranks N] [--gpu_memory 80GB] [--max_length N] [--flag value …]",),
        options=(
            Option(name="ranks", value="N", help="GPUs; default: as many as tensor, pipeline and context sizes need"),
            Option(name="gpu_memory", value="SIZE", help="memory of one GPU; default 80GB"),
            Option(name="host_memory", value="SIZE", help="host memory of one rank; default: unlimited"),
        ),
        takes=lambda key: key.startswith("parallel.") or key in PLANNED,
        run=plan,
    ),
    Verb(
        name="config",
        summary="show the resolved settings and where each came from",
        description="Print every setting as YAML (again a recipe), with where its value came from.",
        usage=("config [recipe.yaml] [key=value …] [--flag value …] [--only changed]",),
        options=(
            Option(
                name="only",
                value="changed",
                help="print only settings that differ from their default",
                choices=("changed",),
            ),
        ),
        takes=lambda key: True,
        recipe=True,
        run=config,
    ),
)
VERBS = {verb.name: verb for verb in _ALL}
