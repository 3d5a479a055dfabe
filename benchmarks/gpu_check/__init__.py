"""The stages of `make gpu-check` (benchmarks/gpu_session.py), one module each: `run(bench, stage)` measures and writes to the record.

`stages` lists the stages, `record` is the results file, `page` makes docs/gpu.md from it, `worker` is the process that uses the GPU, and
`bench` is code that several stages share. The stages use the project's public functions or its command line.
"""
