"""`adapterd adapters`: looking after adapters from the command line, through a server or straight on a store."""
