"""The figures of all replicas as one text for Prometheus: each sample is labelled with the replica that it is of."""

from __future__ import annotations

import re
from collections.abc import Mapping

_SAMPLE = re.compile(r"([A-Za-z_:][A-Za-z0-9_:]*)(?:\{(.*)\})? (.+)")


def joined(texts: Mapping[str, str]) -> str:
    """One text of those of the replicas, by their names. A family's lines stay together, as the format asks for."""
    heads: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for replica, text in texts.items():
        family = ""
        for line in text.splitlines():
            if line.startswith("# HELP "):
                family = line.split(" ", 3)[2]
                heads.setdefault(family, [line])
            elif line.startswith("# TYPE "):
                if len(heads.setdefault(family, [])) < 2:
                    heads[family].append(line)
            elif found := _SAMPLE.fullmatch(line):
                name, labels, value = found.groups()
                labels = f'{labels},replica="{replica}"' if labels else f'replica="{replica}"'
                heads.setdefault(family, [])
                samples.setdefault(family, []).append(f"{name}{{{labels}}} {value}")
    lines = [line for family in heads for line in (*heads[family], *samples.get(family, ()))]
    return "".join(f"{line}\n" for line in lines)
