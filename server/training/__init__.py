"""Training and measuring adapters: `adapterd train` and `adapterd evaluate`. The server imports nothing from here."""
