"""lora: a client of FedAvg; only the adapter travels."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from lora.task import Net, load_data
from lora.task import test as test_net
from lora.task import train as train_net

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """One round."""
    node, run = context.node_config, context.run_config
    net = Net(run["checkpoint"])
    set_peft_model_state_dict(net, message.content["arrays"].to_torch_state_dict())
    loader, _ = load_data(node["partition-id"], node["num-partitions"], run["batch-size"])
    loss = train_net(net, loader, run["local-epochs"], message.content["config"]["lr"])
    arrays = ArrayRecord(get_peft_model_state_dict(net))
    metrics = MetricRecord({"train_loss": loss, "num-examples": len(loader.dataset)})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Tests the server's adapter on the client's data."""
    node, run = context.node_config, context.run_config
    net = Net(run["checkpoint"])
    set_peft_model_state_dict(net, message.content["arrays"].to_torch_state_dict())
    _, loader = load_data(node["partition-id"], node["num-partitions"], run["batch-size"])
    metrics = MetricRecord({"loss": test_net(net, loader), "num-examples": len(loader.dataset)})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)
