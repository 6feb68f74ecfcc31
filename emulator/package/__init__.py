"""The emulator as a folder of plain files, and what reads and writes the folder."""
