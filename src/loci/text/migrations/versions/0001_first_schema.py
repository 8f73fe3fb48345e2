"""The first schema: spaces, notes and everything that hangs on a note."""

from alembic import op

from loci.text.schema import metadata

revision = "0001"
down_revision = None


def upgrade() -> None:
    # The first migration may read the live schema: a later one that changes it freezes this state here.
    metadata.create_all(op.get_bind())


def downgrade() -> None:
    metadata.drop_all(op.get_bind())
