"""Silences, by their text, warnings and log lines that Megatron causes again and again: about optional packages and its own use of
torch.
"""

import functools
import logging
import warnings

KNOWN_WARNINGS = (
    (r"(Transformer Engine and )?Apex (is|are) not installed", r"megatron\."),
    (r"full scope is deprecated", r"megatron\."),
    (r"MimoModelConfig is experimental", r"megatron\."),  # since 0.19, from an import of GPTModel
    (r"The \.grad attribute of a Tensor that is not a leaf", r"megatron\."),
    (r"`load_state_dict` is deprecated", r"megatron\."),
    (r"Please use DTensor", r"torch\.distributed\.checkpoint"),
    (r"`is_gradient_checkpointing` is deprecated", r"transformers\."),
    (r"`torch.distributed.(all_gather_into|reduce_scatter)_tensor` is deprecated", r"torch\.distributed\.c10d_logger"),
)
KNOWN_LOGS = (
    ("torch.utils.cpp_extension", "No CUDA runtime is found"),
    # since 0.19
    ("megatron.core.models.gpt.gpt_model", "GPTModel IS DEPRECATED"),
    ("megatron.core.distributed.distributed_data_parallel", "full_param_layout not provided"),
    ("megatron.core.dist_checkpointing.strategies.torch", "async save is deprecated"),
)


@functools.cache
def quiet() -> None:
    """Silences the known warnings and log lines. Later calls are free."""
    for message, module in KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", message=message, module=module)
    for logger, text in KNOWN_LOGS:
        drop_log(logger, text)


def drop_log(logger: str, text: str) -> None:
    """Drops records of a logger that contain `text`."""

    def passes(record: logging.LogRecord) -> bool:
        return text not in record.getMessage()

    logging.getLogger(logger).addFilter(passes)
