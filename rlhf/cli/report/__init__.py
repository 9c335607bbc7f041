"""The verb `report`: from folders to a page; how a page looks is rlhf/reporting's."""
