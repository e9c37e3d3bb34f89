"""What is recorded besides the choices: one file for each recording, with its values and its proof. `chosen.py` lists
them."""
