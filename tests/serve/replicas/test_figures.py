"""The figures of several replicas in one text."""

from prometheus_client.parser import text_string_to_metric_families

from exitlm.serve.metrics import Metrics
from exitlm.serve.replicas.figures import joined


def samples(text: str) -> list[tuple[str, str, tuple[tuple[str, str], ...], float]]:
    return sorted(
        (family.name, sample.name, tuple(sorted(sample.labels.items())), sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    )


def test_each_sample_is_there_for_each_replica() -> None:
    one, other = Metrics(), Metrics()
    other.refused(3)
    texts = {"a": one.text().decode(), "b": other.text().decode()}
    text = joined(texts)
    expected = sorted(
        (family, name, tuple(sorted((*labels, ("replica", replica)))), value)
        for replica, given in texts.items()
        for family, name, labels, value in samples(given)
    )
    assert samples(text) == expected
    assert len(expected) > 20
    assert 'exitlm:requests_refused_total{replica="a"} 0.0' in text
    assert 'exitlm:requests_refused_total{replica="b"} 3.0' in text
    helps = [line for line in text.splitlines() if line.startswith("# HELP")]
    assert len(helps) == len(set(helps))


def test_of_no_replica() -> None:
    assert joined({}) == ""
