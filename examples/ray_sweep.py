"""The sweep of hybrid_sweep.py as Ray actors, on one machine or a cluster, sharing one storage.

Run: `pip install 'hypergrad-jax[ray]'`, then

    python examples/ray_sweep.py --workers 2 --storage sweep.journal

Every actor makes the same `hg.sweep` call; the storage deals the trials out, and takes those of an
actor that dies back into its queue. Ray only starts processes where there is room, and starts a
dead one again. `--address auto` joins a running cluster, for which the storage is a database's URL
that all its machines reach (docs/many_machines.md). `--quick`: 4 short trials.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import digits200
import ray
from hybrid_sweep import SPACE, make_problem

import hypergrad as hg


@ray.remote(max_restarts=-1, max_task_retries=-1)
class Worker:
    """One process of the sweep; Ray gives it the cores and devices that it may see."""

    def sweep(self, storage: str, trials: int, quick: bool) -> dict[str, Any]:
        """Take part until no trial is left; returns what this process did and what all found."""
        begin = time.perf_counter()
        result = hg.sweep(
            make_problem,
            SPACE,
            hg.Splits(*digits200.load()),
            num_trials=trials,
            num_steps=60 if quick else digits200.STEPS,
            batch_size=digits200.BATCH,
            refine=hg.Refine(),
            population=2 if quick else 4,
            storage=storage,
        )
        return {
            "steps": result.steps_spent,
            "seconds": time.perf_counter() - begin,
            "best": result.best._asdict(),
            "table": result.table(5),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--cpus", type=float, help="cores of a worker; default: all, shared evenly")
    parser.add_argument("--gpus", type=float, default=0, help="devices of a worker, such as 1")
    parser.add_argument("--storage", required=True, help="a path such as sweep.journal, or a URL")
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument(
        "--address", help="a running cluster, such as auto; default: start one here"
    )
    parser.add_argument("--quick", action="store_true", help="4 short trials")
    options = parser.parse_args()
    # An actor's working folder is not ours.
    local = "://" not in options.storage
    storage = str(Path(options.storage).resolve()) if local else options.storage
    ray.init(address=options.address, include_dashboard=False)
    cores = ray.cluster_resources()["CPU"]
    cpus = options.cpus or cores // options.workers
    if cpus * options.workers > cores or not cpus:
        parser.error(f"--workers {options.workers} need more than the {cores:.0f} cores there are")
    environment = {
        # The workers import what stands beside this file.
        "PYTHONPATH": str(Path(__file__).resolve().parent),
        # XLA's threads: without it every worker would take all cores of its machine.
        "NPROC": str(max(1, int(cpus))),
    }
    workers = [
        Worker.options(
            num_cpus=cpus, num_gpus=options.gpus, runtime_env={"env_vars": environment}
        ).remote()
        for _ in range(options.workers)
    ]
    trials = 4 if options.quick else options.trials
    calls = [worker.sweep.remote(storage, trials, options.quick) for worker in workers]
    for i, report in enumerate(ray.get(calls)):
        print(f"worker {i}: {report['steps']} training steps, {report['seconds']:.0f} s")
    print(report["table"])
    ray.shutdown()


if __name__ == "__main__":
    main()
