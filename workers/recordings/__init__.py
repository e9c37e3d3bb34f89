"""What is recorded beside the choices: a file each, with its values and its proof. `chosen.py` lists them."""
