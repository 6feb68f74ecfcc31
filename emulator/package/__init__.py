"""The emulator package: a folder of plain files, and the code that reads and writes the folder."""
