"""A table of no library that tests import: it exports Arrow data, as polars and others do."""

import pytest


class ArrowStream:
    """Offers the columns of a DataFrame by the one method that tables share."""

    def __init__(self, table):
        self.table = pytest.importorskip("pyarrow").Table.from_pandas(table, preserve_index=False)

    def __arrow_c_stream__(self, requested_schema=None):
        return self.table.__arrow_c_stream__(requested_schema)

    def __len__(self):
        return len(self.table)
