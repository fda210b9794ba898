"""The soak, for a short while; ``python -m tests.adajudge.soak --seconds 300`` goes on longer."""

from tests.adajudge.soak import problems, soak


def test_thirty_two_clients_with_bad_rows_and_broken_connections(capsys):
    report = soak(seconds=8)
    with capsys.disabled():
        print(f"\nsoak: {report}")
    assert not problems(report)
    assert report.disconnected > 0
    assert report.answers["200"] > 100
    assert {"400", "404", "422"} & set(report.answers)
    assert report.latency(99) < 10_000
