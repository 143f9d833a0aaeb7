"""Who may do what: API keys and JSON Web Tokens, scopes, adapters, rates."""
