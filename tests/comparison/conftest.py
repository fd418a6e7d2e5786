"""What the tests of the comparison share."""

from pathlib import Path

import pytest

from tests.comparison.run_folders import write_example_runs


@pytest.fixture
def example_runs(tmp_path: Path) -> Path:
    """A folder with the example runs."""
    write_example_runs(tmp_path)
    return tmp_path
