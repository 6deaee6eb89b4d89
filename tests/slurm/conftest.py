"""The virtual cluster, once a session; without one, its tests are skipped and say what is missing."""

import pytest
from cluster import Cluster, missing


@pytest.fixture(scope="session")
def cluster():
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    cluster = Cluster()
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
