"""How invented people are made, checked and written as a dataset."""
