"""delta-pretrain: train a source network. It is an ordinary run (conf/pretrain.yaml) from random weights."""

from .run import main as run_main


def main() -> None:
    run_main("pretrain")


if __name__ == "__main__":
    main()
