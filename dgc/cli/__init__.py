"""The commands of `python -m dgc`: plan says what is faster, doctor what is wrong. `import dgc` leaves them out."""
