"""Runs the migrations over the connection that the store has opened; there is no alembic.ini."""

from alembic import context

from loci.text.schema import metadata

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=metadata, render_as_batch=True)
with context.begin_transaction():
    context.run_migrations()
