"""VFL-Select: sort training rows by the vision function they need and pick. Import: vfl_train.data_select."""

if __name__ == "data_select":
    # From the root of a checkout Python would find this folder too, and every class in it would exist twice.
    raise ImportError("import vfl_train.data_select, not data_select")
