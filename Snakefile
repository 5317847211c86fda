# The notebooks as a graph of papermill runs. Usually called by `make reproduce`; by hand, or on a cluster:
#   snakemake --cores 2 --config scale=laptop
#   snakemake --config scale=full --executor slurm --jobs 20 --default-resources ...
# What has to run is decided by content, not by times: each finished run leaves an empty file named after a hash of what
# determines it (notebook, parameters, the code of the modules that it imports, data/, requirements.lock, the notebooks it needs;
# steerkit/book/jobs.py and closure.py).
import sys
from pathlib import Path

from steerkit.book.jobs import jobs, select

# Snakemake reads 007 and 2026_11 as numbers, file names never.
SCALE, NOTEBOOK = config.get("scale", "laptop"), config.get("notebook", "")
if not isinstance(SCALE, str):
    raise WorkflowError(f"scale: expected a name, and Snakemake read the value {SCALE}: write it with its ending, scale=NAME.yaml")
JOBS = jobs(SCALE.removesuffix(".yaml"), root=Path.cwd())


rule all:
    input:
        [path for job in select(JOBS, str(NOTEBOOK).removesuffix(".ipynb")) for path in job.outputs],


for job in JOBS.values():

    rule:
        name:
            f"nb_{job.name}"
        input:
            [JOBS[need].outputs for need in job.needs],
        output:
            job.outputs,
        params:
            python=sys.executable,
            notebook=job.name,
            scale=job.scale,
            key=job.key,
        threads: 2
        shell:
            "{params.python:q} -m steerkit.book.run notebook {params.notebook:q} --scale {params.scale:q} --key {params.key} --root ."
