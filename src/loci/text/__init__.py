"""The text room: notes, the store that keeps them, and the systems that organise them."""
