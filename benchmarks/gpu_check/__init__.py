"""The stages of `make gpu-check` (benchmarks/gpu_session.py), one module each: `run(bench, stage)` measures and writes into the record.

`stages` lists them, `record` is the results file, `page` makes docs/gpu.md of it, `worker` is the process that uses the GPU, and
`bench` holds what several stages share. Everything that is compared uses the project's public functions or its command line.
"""
