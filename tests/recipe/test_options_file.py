from gralora.recipe.options_file import read_options_file


def test_an_empty_file_holds_no_options(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("# nothing yet\nlr:\n")
    assert read_options_file(str(file)) == {}
