"""The optimizers inside of other people's trainers: `make test-integrations`."""
