"""Benchmark results that nobody measured: plausible figures for testing what reads, draws and compares results."""

from __future__ import annotations

from typing import Any, cast

import msgspec
import numpy as np

from mvmoe_deploy.bench import results as r
from mvmoe_deploy.selftest import StageResult

EXPERTS = 10
CLASSES = 40

HOSTILE = '"><img src=http://192.0.2.1/x onerror=alert(1)><script>alert(2)</script>|$\\alpha_{$&amp;\x1b[31m\n=1+1'
"""A model's name that tries to become markup, script, a shell's colours, a formula, a table's column."""

SIZES: dict[str, tuple[float, float, float, float]] = {
    # kind: ms at p50, parameters in millions, active ones, MB in memory
    "dense": (9.1, 5.5, 5.5, 35.8),
    "mobile-vmoe": (9.4, 11.5, 5.6, 38.2),
    "dense-wide": (31.0, 22.0, 22.0, 110.0),
    "all-experts": (10.9, 11.5, 5.6, 74.0),
    "vmoe": (13.3, 11.5, 5.6, 76.0),
    "stock": (9.9, 5.5, 5.5, 37.1),
}


def estimate(value: float, spread: float = 0.02) -> r.Estimate:
    """A value with an interval of that relative half-width."""
    return r.Estimate(value, value * (1 - spread), value * (1 + spread))


def latency(milliseconds: float, seed: int = 0, count: int = 300, reasons: list[str] | None = None) -> r.Latency:
    """Samples around a median, with the slow tail that real ones have."""
    generator = np.random.default_rng(seed)
    samples = milliseconds * (0.96 + generator.gamma(1.2, 0.05, count))
    p50, p90, p99 = (estimate(float(p)) for p in np.percentile(samples, [50, 90, 99]))
    noise = r.Noise(float(samples.std() / samples.mean()), 0.8, None, reasons or [])
    return r.Latency(1.9 * milliseconds, 20, p50, p90, p99, noise, samples.round(4).tolist())


def point(resident: int, megabytes: float) -> r.MemoryPoint:
    return r.MemoryPoint(resident, int(megabytes * 0.7e6), int(megabytes * 0.3e6), int(megabytes * 0.8e6))


def row(kind: str, name: str | None = None, scale: float = 1.0, seed: int = 0, **changes: Any) -> r.Row:
    """Everything that can be measured of one configuration."""
    milliseconds, parameters, active, memory = (scale * value for value in SIZES[kind])
    routed = kind == "mobile-vmoe"
    generator = np.random.default_rng(seed)
    experts = EXPERTS if routed else 0
    heat = generator.multinomial(25, [0.1] * EXPERTS, CLASSES) // 3
    heat[np.arange(CLASSES), np.arange(CLASSES) % EXPERTS] += 18
    cold = {name: (generator.normal(at, 2, 9) * scale).tolist() for name, at in
            {"interpreter": 20, "imports": 110, "load": 60, "first_run": 18}.items()}  # fmt: skip
    made = r.Row(
        name=name or kind,
        group="12x192",
        kind=cast(r.Kind, kind),
        backend="onnxruntime",
        precision="fp32",
        layout="separate",
        flops=int(112e6 * active),
        macs=int(55.6e6 * active),
        counted_macs=int(55.6e6 * active),
        parameters=int(parameters * 1e6),
        active_parameters=int(active * 1e6),
        bytes_on_disk=int(parameters * 4e6),
        bytes_first_image=int(active * 4e6),
        bytes_per_expert=[2_400_000] * experts,
        warm=latency(milliseconds, seed),
        ratio=None if kind == "dense" else estimate(milliseconds / (SIZES["dense"][0] * scale)),
        hit=latency(milliseconds * 1.01, seed + 1) if routed else None,
        switch=latency(milliseconds * 2.2, seed + 2) if routed else None,
        cold_start=r.ColdStart(**cold, total=estimate(208 * scale)),
        memory=r.Memory(
            point(0, memory * 0.8),
            point(min(1, experts), memory),
            [point(n + 1, memory + 4.4 * scale * n) for n in range(max(1, experts))],
            int(memory * 1.3e6),
        ),
        throughput=[r.Throughput(b, estimate(1000 / milliseconds * b**0.15)) for b in (1, 2, 4, 8, 16, 32, 64)],
        residency=[
            r.Residency(mix, n, min(1.0, share + 0.1 * n), milliseconds * (2.4 - min(1.0, share + 0.1 * n)),
                        milliseconds * 3, int((memory + 4.4 * n) * 1e6))
            for mix, share in (("uniform", 0.0), ("skewed", 0.4), ("bursts", 0.7)) for n in (1, 2, 4, 7, 10)
        ] if routed else [],
        accuracy=r.Accuracy(1000, 0.595 + {"mobile-vmoe": 0.034, "dense-wide": 0.021, "all-experts": 0.034, "vmoe": 0.041}.get(kind, 0), 0.84, 0.871 if routed else None,
                            heat.tolist() if routed else []),
        paper=r.Paper(618.0 * scale, 62.9 if routed else 59.51) if kind in ("dense", "mobile-vmoe") else None,
        selftest=[StageResult("pixels", 10, passed=10, departure=None, tolerance=None), StageResult("route", 10, passed=10, departure=None, tolerance=None),
                  StageResult("gate", 10, passed=10, departure=2.4e-7, tolerance=1e-4), StageResult("logits", 10, passed=10, departure=0.0, tolerance=1e-4)] if routed else [],
    )  # fmt: skip
    return msgspec.structs.replace(made, **changes)


def results(rows: list[r.Row] | None = None, **method: Any) -> r.Results:
    """A run; by default one row of every kind, one of them too noisy to quote."""
    if rows is None:
        rows = [row(kind, seed=10 * seed) for seed, kind in enumerate(SIZES)]
        rows[-1] = msgspec.structs.replace(
            rows[-1], warm=latency(9.9, 7, reasons=["coefficient of variation 0.31 is above 0.15"])
        )
    machine = {"processor": "Imagined CPU, 2 cores", "cores": 2, "system": "Linux-6.1-x86_64", "load_average": [0.4, 0.5, 0.6],
               "python": "3.11.7", "onnxruntime": "1.31.1", "commit": "0123abc", "date": "2026-11-01T12:00:00+00:00"}  # fmt: skip
    routed = any(each.accuracy and each.accuracy.heat_map for each in rows)
    return r.Results(
        r.FORMAT,
        rows,
        machine,
        {"threads": 1, "rounds": 300, "images": 16, "order": "interleaved, order drawn every round", **method},
        [f"class {index}" for index in range(CLASSES)] if routed else [],
        [f"group {index}" for index in range(EXPERTS)] if routed else [],
    )


def paper_suite() -> r.Results:
    """Several scales with the paper's figures and no accuracy of their own, as random weights give."""
    scales = {"12x384": (2297, 71.88, 74.23), "6x384": (1207, 63.21, 66.91), "12x192": (618, 59.51, 62.90),
              "6x192": (338, 51.18, 55.69), "12x96": (176, 53.79, 55.39), "6x64": (54, 36.64, 41.30)}  # fmt: skip
    rows = []
    for seed, (name, (flops, dense, moe)) in enumerate(scales.items()):
        for kind, top1 in (("dense", dense), ("mobile-vmoe", moe)):
            rows.append(row(kind, f"{kind} {name}", flops / 618, seed, group=name, accuracy=None, residency=[],
                            paper=r.Paper(flops, top1), flops=flops * 1_000_000))  # fmt: skip
    return results(rows)


def bare(name: str = "bare") -> r.Row:
    """Only what every row has."""
    full = row("dense", name)
    required = [field.name for field in msgspec.structs.fields(r.Row) if field.required]
    return r.Row(
        **{field: getattr(full, field) for field in required}
        | {"flops": None, "macs": None, "counted_macs": None, "active_parameters": None}
    )
