"""vit: a client of FedAvg."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from vit.task import Net, load_data
from vit.task import test as test_net
from vit.task import train as train_net

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """One round."""
    node, run = context.node_config, context.run_config
    net = Net(run["checkpoint"])
    net.load_state_dict(message.content["arrays"].to_torch_state_dict())
    loader, _ = load_data(node["partition-id"], node["num-partitions"], run["batch-size"])
    loss = train_net(net, loader, run["local-epochs"], message.content["config"]["lr"])
    metrics = MetricRecord({"train_loss": loss, "num-examples": len(loader.dataset)})
    return Message(RecordDict({"arrays": ArrayRecord(net.state_dict()), "metrics": metrics}), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Tests the server's model on the client's data."""
    node, run = context.node_config, context.run_config
    net = Net(run["checkpoint"])
    net.load_state_dict(message.content["arrays"].to_torch_state_dict())
    _, loader = load_data(node["partition-id"], node["num-partitions"], run["batch-size"])
    metrics = MetricRecord(
        dict(zip(("loss", "accuracy"), test_net(net, loader), strict=True)) | {"num-examples": len(loader.sampler)}
    )
    return Message(RecordDict({"metrics": metrics}), reply_to=message)
