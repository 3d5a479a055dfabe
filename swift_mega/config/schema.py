"""The one settings tree: frozen dataclasses, with units and defaults, that say what a run is.

A recipe (YAML), dotted overrides and SWIFT-style flags all fill this same tree (`config.load`). So a setting has one name, one type and
one default, wherever its value comes from. A field whose metadata has `flag` can also be set by these SWIFT names.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

TIMEOUT_MINUTES = 60
KernelForm = Literal["auto", "fused", "reference"]


Limit = tuple[str, Callable[[Any], bool]]
"""What a value has to be, in words and as a predicate."""

AT_LEAST_1: Limit = ("a whole number of at least 1", lambda v: v >= 1)
NOT_NEGATIVE: Limit = ("at least 0", lambda v: v >= 0)
ABOVE_0: Limit = ("above 0", lambda v: v > 0)
PROBABILITY: Limit = ("at least 0 and below 1", lambda v: 0 <= v < 1)


def setting(
    default: Any = None,
    *,
    flag: str = "",
    help: str = "",
    factory: Any = None,
    empty: bool = False,
    limit: Limit | None = None,
) -> Any:
    """A field with its SWIFT flag names (space-separated, without dashes) and one line of help. empty: whether "" is a valid value.

    limit: which values are possible; None: whole numbers of at least 1, other numbers of at least 0.
    """
    metadata = {"flag": tuple(flag.split()), "help": help, "empty": empty, "limit": limit}
    return field(default_factory=factory, metadata=metadata) if factory else field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Model:
    """The model, its dtype and its vocabulary."""

    path: str | None = setting(flag="model model_name_or_path", help="Hugging Face directory of the model")
    adapters: tuple[str, ...] = setting((), flag="adapters", help="PEFT directory of the adapter to start from")
    dtype: Literal["auto", "bfloat16", "float32", "float64"] = setting(
        "auto",
        flag="torch_dtype",
        help="dtype of the weights in training; auto: bfloat16 on CUDA, float32 on CPU; float64: to compare exactly",
    )
    dequantize: bool = setting(
        False,
        flag="dequantize",
        help="read a quantised checkpoint (FP8, MXFP4, GPTQ, AWQ, bitsandbytes) as plain weights; false: it is refused",
    )
    resize_vocab: bool = setting(
        False, flag="resize_vocab", help="add rows to embedding and output layer where the tokenizer has more tokens"
    )
    new_special_tokens: tuple[str, ...] = setting(
        (),
        flag="new_special_tokens",
        help="special tokens to add to the tokenizer, or a .txt file of them, with their rows",
    )
    new_rows: Literal["transformers", "mean"] = setting(
        "transformers",
        flag="new_rows",
        help="values of added rows: random around the mean of the old rows, or that mean",
    )
    vocab_divisible_by: int = setting(
        128,
        flag="make_vocab_size_divisible_by",
        help="the vocabulary is padded to a multiple of this many rows times the tensor size",
    )
    router_aux_loss_coefficient: float = setting(
        0.0, flag="moe_aux_loss_coeff", help="weight of the load-balancing loss of an MoE model"
    )
    megatron: dict[str, Any] = setting(
        factory=dict, help="passed to Megatron's TransformerConfig, checked against its fields"
    )


ContextKind = Literal[
    "auto", "ring", "ulysses", "hybrid", "allgather", "te:p2p", "te:a2a", "te:allgather", "te:a2a+p2p"
]


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """How the model and the batch are split over ranks; a size is a number of ranks."""

    tensor: int = setting(1, flag="tensor_model_parallel_size tp", help="ranks over which each matrix is split")
    pipeline: int = setting(1, flag="pipeline_model_parallel_size pp", help="pipeline stages")
    virtual_pipeline: int = setting(
        1, flag="virtual_pipeline_model_parallel_size vpp", help="model chunks per stage (interleaved schedule)"
    )
    pipeline_layout: str | None = setting(
        flag="pipeline_model_parallel_layout",
        help="layers of every chunk in model order, '7,8,8,7', or Megatron's own form 'Et*7|t*8|t*8|t*7L'",
    )
    first_stage_layers: int | None = setting(
        flag="decoder_first_pipeline_num_layers",
        help="layers of the first stage; the others are spread evenly over the other stages",
    )
    last_stage_layers: int | None = setting(flag="decoder_last_pipeline_num_layers", help="layers of the last stage")
    sequence: bool = setting(
        False, flag="sequence_parallel sp", help="split activations by tokens over the tensor ranks"
    )
    context: int = setting(1, flag="context_parallel_size", help="ranks over which the tokens of each row are split")
    cp: ContextKind = setting(
        "auto",
        flag="cp",
        help="attention over context ranks; auto: Ulysses with as many ranks as key heads allow, ring over the rest; "
        "te:…: Transformer Engine's own, on CUDA",
    )
    ulysses: int | None = setting(
        flag="ulysses_size",
        help="ranks of the inner axis of cp=hybrid and te:a2a+p2p; default: as many as key heads allow",
    )
    expert: int = setting(
        1, flag="expert_model_parallel_size ep", help="ranks over which the experts of a layer are split"
    )
    expert_tensor: int | None = setting(
        flag="expert_tensor_parallel_size etp",
        help="ranks over which each expert's matrices are split; default: the tensor size",
    )
    distributed_optimizer: bool = setting(
        True, flag="use_distributed_optimizer", help="shard optimizer state over the data-parallel ranks"
    )
    overlap_grad_reduce: bool = setting(
        False, flag="overlap_grad_reduce", help="reduce gradients during the backward pass"
    )
    overlap_param_gather: bool = setting(
        False, flag="overlap_param_gather", help="gather parameters during the forward pass (distributed optimizer)"
    )
    gradients_in_float32: bool = setting(
        True,
        flag="accumulate_allreduce_grads_in_fp32",
        help="sum gradients over microbatches and ranks in float32; false: in bfloat16 with bfloat16 weights, in half the memory",
    )
    ddp_bucket_size: int | None = setting(
        flag="ddp_bucket_size", help="elements per bucket of overlapped communication; default: Megatron's"
    )
    distributed_timeout_minutes: int = setting(
        TIMEOUT_MINUTES,
        flag="distributed_timeout_minutes",
        help="timeout in minutes of a collective that some rank has not joined; the run then ends",
    )


@dataclass(frozen=True, kw_only=True)
class Data:
    """Training and validation data."""

    dataset: tuple[str, ...] = setting((), flag="dataset", help="JSONL files; 'path#500' takes 500 rows")
    val_dataset: tuple[str, ...] = setting((), flag="val_dataset", help="JSONL files of validation data")
    split_dataset_ratio: float = setting(
        0.0, flag="split_dataset_ratio", help="fraction of the rows that is kept for validation"
    )
    columns: dict[str, str] = setting(
        factory=dict, flag="columns", help="names of columns: in the file -> in swift_mega"
    )
    dataset_info: str | None = setting(
        flag="custom_dataset_info dataset_info", help="dataset_info.json that names data sets"
    )
    system: str | None = setting(
        flag="system",
        help='system message for rows that have none; "": an empty one, which keeps a template from adding its own',
        empty=True,
    )
    chat_template: str | None = setting(
        flag="chat_template", help="a .jinja file used in place of the tokenizer's own chat template"
    )
    model_name: str | None = setting(flag="model_name", help="fills {{NAME}} in the rows")
    model_author: str | None = setting(flag="model_author", help="fills {{AUTHOR}} in the rows")
    max_length: int = setting(2048, flag="max_length seq_length", help="tokens of one example, and of one packed row")
    truncation: Literal["delete", "left", "right", "raise"] = setting(
        "delete", flag="truncation_strategy", help="what happens to an example of more than max_length tokens"
    )
    packing: bool = setting(
        False, flag="packing", help="join examples into rows of max_length tokens, without attention between examples"
    )
    loss_on: Literal["assistant", "last", "all"] = setting(
        "assistant", flag="loss_scale", help="tokens with loss: those of replies, of the last reply, or all"
    )
    shuffle: bool = setting(
        True, flag="dataset_shuffle train_dataloader_shuffle", help="shuffle the rows in each epoch"
    )
    seed: int = setting(42, flag="data_seed", help="seed of the shuffle and the validation split")


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The loss that is minimised.

    An objective with settings of its own derives its class of settings from this one, in its own file.
    """

    name: str = setting(
        "next_token", help="a module of swift_mega/objectives, or the dotted name of a module of your own"
    )


@dataclass(frozen=True, kw_only=True)
class Tuner:
    """Which parameters are trained.

    A tuner with settings of its own derives its class of settings from this one, in its own file.
    """

    type: str = setting(
        flag="tuner_type train_type",
        help="a module of swift_mega/tuners (lora, full), or the dotted name of a module of your own",
    )
    makes_adapter: ClassVar[bool] = False
    """Whether a checkpoint of the run is an adapter, which can be loaded and merged; else it is a whole model."""


@dataclass(frozen=True, kw_only=True)
class Full(Tuner):
    """Which parameters are trained."""

    type: str = "full"


@dataclass(frozen=True, kw_only=True)
class Lora(Tuner):
    """Which parameters are trained.

    These are here and not in tuners/lora.py because LoRA is the default: with them, a command line is checked before torch is imported.
    """

    type: str = "lora"
    rank: int = setting(8, flag="lora_rank", help="inner dimension of an adapter")
    alpha: float = setting(
        32.0,
        flag="lora_alpha",
        help="adapter output is scaled by alpha / rank (rslora: alpha / sqrt(rank))",
        limit=ABOVE_0,
    )
    dropout: float = setting(
        0.0, flag="lora_dropout", help="probability of dropping an adapter's input", limit=PROBABILITY
    )
    rslora: bool = setting(False, flag="use_rslora", help="rank-stabilised scale, arXiv:2312.03732")
    target_modules: tuple[str, ...] = setting(
        ("all-linear",), flag="target_modules", help="Hugging Face names of linears (q_proj …) or all-linear"
    )
    makes_adapter: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class Optim:
    """AdamW and its learning rate."""

    lr: float = setting(1e-4, flag="lr learning_rate", help="peak learning rate")
    min_lr: float = setting(0.0, flag="min_lr", help="learning rate at the end of the decay")
    schedule: Literal["cosine", "linear", "constant"] = setting("cosine", flag="lr_decay_style lr_scheduler_type")
    warmup_fraction: float = setting(
        0.0, flag="lr_warmup_fraction warmup_ratio", help="fraction of the steps that warm up"
    )
    warmup_steps: int = setting(0, flag="lr_warmup_iters warmup_steps", help="steps that warm up")
    weight_decay: float = setting(0.1, flag="weight_decay")
    beta1: float = setting(0.9, flag="adam_beta1")
    beta2: float = setting(0.95, flag="adam_beta2")
    eps: float = setting(1e-8, flag="adam_eps")
    clip_grad: float = setting(
        1.0, flag="clip_grad max_grad_norm", help="the gradient's norm is clipped to this; 0: no clipping"
    )
    cpu_offload: bool = setting(
        False, flag="optimizer_cpu_offload", help="keep AdamW's state, and take its step, in host memory"
    )
    offload_fraction: float = setting(
        1.0, flag="optimizer_offload_fraction", help="fraction of the elements whose state is in host memory"
    )


@dataclass(frozen=True, kw_only=True)
class Train:
    """The training loop: batches, steps, memory, checkpoints."""

    output_dir: str = setting("output", flag="output_dir save", help="each run creates vN-YYYYMMDD-HHMMSS in it")
    add_version: bool = setting(True, flag="add_version", help="false: write into output_dir itself")
    micro_batch_size: int = setting(
        1,
        flag="micro_batch_size per_device_train_batch_size",
        help="examples (or packed rows) per microbatch of a rank",
    )
    global_batch_size: int = setting(16, flag="global_batch_size", help="examples (or packed rows) per optimizer step")
    steps: int | None = setting(flag="train_iters max_steps", help="optimizer steps; default: as many as epochs need")
    epochs: float | None = setting(
        flag="num_train_epochs max_epochs", help="passes over the data; default 1 where steps is not set"
    )
    seed: int = setting(42, flag="seed", help="seed of initial adapter values and dropout")
    deterministic: bool = setting(
        False,
        flag="deterministic deterministic_mode",
        help="bit-identical results in every run: each op in its deterministic form, or an error that names an op without one",
    )
    kernels: KernelForm = setting(
        "auto",
        flag="kernels",
        help="form of every op (attention, norms, rotation, loss, …); auto: the best one there is; fused: refuse the run where an op has "
        "no fused kernel; reference: plain torch, without Transformer Engine, for proofs and for finding a faulty kernel",
    )
    kernels_by_op: dict[str, KernelForm] = setting(
        factory=dict, flag="kernels_by_op", help="form of single ops, by the names in a run's first lines"
    )
    recompute: Literal["none", "selective", "full"] = setting("none", flag="recompute_granularity")
    recompute_method: Literal["uniform", "block"] = setting("uniform", flag="recompute_method")
    recompute_layers: int = setting(1, flag="recompute_num_layers", help="layers per recomputed block")
    tile_mlp: bool = setting(
        False,
        flag="tile_mlp",
        help="compute MLPs and norms for one tile of tokens at a time, and recompute them in the backward pass",
    )
    mlp_tile_size: int | None = setting(
        flag="mlp_tile_size", help="tokens of a rank in a tile of tile_mlp; default: the hidden size"
    )
    loss_chunk_size: int | None = setting(
        flag="loss_chunk_size",
        help="tokens of a rank whose logits are in memory at once; default: as many as fit 128 MiB",
    )
    offload_activations: bool = setting(
        False, flag="offload_activations", help="keep layer inputs in host memory until the backward pass"
    )
    eval_batches: int | None = setting(
        flag="eval_iters", help="global batches of the validation split in an evaluation; default: all of them"
    )
    eval_steps: int | None = setting(
        flag="eval_interval eval_steps", help="steps between evaluations; default: at the end"
    )
    save_steps: int | None = setting(
        flag="save_interval save_steps", help="steps between checkpoints; default: at the end"
    )
    save_total_limit: int | None = setting(flag="save_total_limit", help="most checkpoints that are kept; default: all")
    logging_steps: int = setting(1, flag="log_interval logging_steps", help="steps between lines of logging.jsonl")


@dataclass(frozen=True, kw_only=True)
class Export:
    """The Hugging Face files that a run writes."""

    merge_lora: bool = setting(False, flag="merge_lora", help="write merged weights beside the adapter")
    max_shard_size: str = setting("5GB", flag="max_shard_size", help="bytes per safetensors file: 500MB, 5GB, …")


@dataclass(frozen=True, kw_only=True)
class Monitor:
    """Where metrics are written besides logging.jsonl."""

    report_to: tuple[Literal["tensorboard", "wandb"], ...] = setting(("tensorboard",), flag="report_to")
    wandb_project: str = setting("swift_mega", flag="wandb_project")
    wandb_run_name: str | None = setting(flag="wandb_exp_name run_name")
    progress: bool = setting(True, flag="progress", help="draw a progress bar")


@dataclass(frozen=True, kw_only=True)
class Run:
    """All settings of a run."""

    model: Model = field(default_factory=Model)
    parallel: Parallel = field(default_factory=Parallel)
    data: Data = field(default_factory=Data)
    objective: Objective = field(default_factory=Objective)
    tuner: Tuner = field(default_factory=Lora)
    optim: Optim = field(default_factory=Optim)
    train: Train = field(default_factory=Train)
    export: Export = field(default_factory=Export)
    monitor: Monitor = field(default_factory=Monitor)
