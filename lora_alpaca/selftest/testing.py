"""The self-test as a story: what is tested, on what, check by check, and the verdict."""

import time
from contextlib import suppress

from lora_alpaca.config import FinetuneConfig, SelftestConfig
from lora_alpaca.config.environment import world_size
from lora_alpaca.config.selftest import CHECKS
from lora_alpaca.errors import ConfigError, SelfTestError
from lora_alpaca.selftest.surroundings import temporary


def selftest(config: SelftestConfig) -> None:
    """Print a table of checks. Raises SelfTestError where one fails, and ModelError for a base that does not load."""
    if world_size() > 1:
        raise ConfigError("selftest starts processes of its own; run it without torchrun")
    began = time.perf_counter()
    names = [name for name in CHECKS if config.only is None or name in config.only]
    with temporary() as folder:  # before the hub's library and torch are imported, which read where to write
        import torch

        from lora_alpaca.artifacts import run_record
        from lora_alpaca.models.base import locate_base
        from lora_alpaca.models.device import choose_device
        from lora_alpaca.selftest import checks
        from lora_alpaca.selftest.bench import Bench
        from lora_alpaca.selftest.table import Table
        from lora_alpaca.selftest.tested_base import tested

        named = locate_base(config.base_model, config.revision, config.trust_remote_code)
        base, what = tested(named, folder / "base")
        spec, _ = choose_device(FinetuneConfig(device=config.device, dtype=config.dtype, load_8bit=False))
        bench = Bench(base, spec, folder)
        facts = {
            "base_model": what,
            "precision": str(spec),
            "threads": torch.get_num_threads(),
            "versions": run_record.versions(),
        }
        table = Table(names, config.json)
        results = []
        try:
            table.head(facts)
            if {"ranks", "sharding"} & set(names):
                with suppress(Exception):  # which their checks meet again
                    bench.start_ranks()
            for name in names:
                with table.under_way(name):
                    result = checks.make(name, bench)
                table.add(result)
                results.append(result)
        finally:
            bench.close()
        table.end(facts, results, time.perf_counter() - began)
    if failed := [result.name for result in results if result.status == "failed"]:
        raise SelfTestError(f"{len(failed)} of {len(results)} checks failed: {', '.join(failed)}")
