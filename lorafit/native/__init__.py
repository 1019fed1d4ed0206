"""Fast paths in C++, each beside its plain PyTorch twin: same name, same arguments, compared by tests, switched by `build`."""
