import pytest

from dataflex.testing.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny model")  # a path with a space
    tiny_model(max_position_embeddings=1024).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)
